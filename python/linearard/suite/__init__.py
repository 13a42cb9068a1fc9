"""Measuring models: standard and local tasks, perplexity by position, retrieval from long contexts; docs/evaluation.md.

Each module does one thing: `config` the settings, `sources` the models, `task_files` and `harness` short-text tasks,
`long_text` perplexity, `synthetic` and `retrieval` long-context tasks, `figures` what was measured and its standard
errors, `report` and `picture` how it is shown, `run` all of it in order.
"""
