"""A page on which people compare replies, and preference pairs made of their votes."""
