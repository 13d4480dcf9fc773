"""Adapters in PEFT's LoRA format: what is in a folder, and how one is written."""
