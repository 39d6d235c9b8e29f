"""From files to token ids: formats, sources, chat template, batches.

Reading (`raw`, `turns`, `formats`, `sources`, `check`) imports neither torch nor transformers.
"""
