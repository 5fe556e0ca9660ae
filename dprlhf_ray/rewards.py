"""Rewards in Python, as examples of your own: (prompt, completion) -> float, without any state.

Use one by `scorer: {kind: python, function: "dprlhf_ray.rewards:python_parses"}`.
"""

from __future__ import annotations

import ast
import warnings


def python_parses(prompt: str, completion: str) -> float:
    """1 for Python that parses and defines a function, 0 for Python that parses, below 0 by how early it breaks."""
    lines = completion.splitlines() or [""]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning would quote the completion
            tree = ast.parse(completion)
    except (SyntaxError, ValueError) as e:
        good = min(max((getattr(e, "lineno", 1) or 1) - 1, 0), len(lines) - 1)
        return -1.0 + good / len(lines)
    return 1.0 if any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree)) else 0.0
