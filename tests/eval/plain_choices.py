"""Multiple choice by plain transformers: one text at a time, no code of ppomax but the prompts."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppomax.eval.questions import context


def plain_model(folder):
    """Model and tokenizer as transformers loads them, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def plain_sums(model, tokenizer, before, afters):
    """Summed log-probs of each continuation; a context is read again only where ids differ."""
    start = len(tokenizer(before)["input_ids"])
    sums, seen = [], {}
    for after in afters:
        ids = tokenizer(before + after)["input_ids"]
        key = tuple(ids[:-1])
        if key not in seen:
            seen[key] = model(torch.tensor([key])).logits[0, start - 1 :].double().log_softmax(-1)
        sums.append(sum(float(seen[key][t - start, ids[t]]) for t in range(start, len(ids))))
    return sums


def plain_right(folder, questions, shots):
    """Whether each question is answered rightly by letter, by text per byte, by text."""
    model, tokenizer = plain_model(folder)
    found = []
    for question, examples in zip(questions, shots, strict=True):
        space = "" if question.language == "zh" else " "
        letters = [space + "ABCDEFGHIJ"[i] for i in range(len(question.choices))]
        texts = [space + choice for choice in question.choices]
        letter = plain_sums(model, tokenizer, context(question, examples, "letter"), letters)
        text = plain_sums(model, tokenizer, context(question, examples, "text"), texts)
        by_byte = [value / len(t.encode()) for value, t in zip(text, texts, strict=True)]
        picks = [values.index(max(values)) for values in (letter, by_byte, text)]
        found.append([pick == question.answer for pick in picks])
    return found
