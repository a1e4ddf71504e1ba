"""Evals: jpaged as a model of evaluation harnesses.

Pipeline: tasks of a harness -> [evals] -> llm, and back.

`jpaged.evals.lm_eval.JPagedLM` is a model of lm-evaluation-harness; it needs the extra
`lm_eval`.
"""
