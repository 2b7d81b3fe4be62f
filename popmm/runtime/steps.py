"""The passes of lossless decoding: drafts, what checks them, and dense steps, each as a form of its own.

Compiled, each form has code of its own, so that none of them has to be told from the others at each step; and what
checks drafts always reads the same number of tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from popmm import compat
from popmm.runtime.drafts import Drafts
from popmm.runtime.guards import WARM, held_after
from popmm.runtime.replay import compile_apart


def _step(model: nn.Module, inputs: dict[str, Any]):
    return model(**inputs, return_dict=True)


class Steps:
    """Runs the passes of one ``generate``."""

    def __init__(self, model: nn.Module, drafts: Drafts, config: Any, model_kwargs: dict[str, Any]) -> None:
        self.model, self.drafts = model, drafts
        self.compiles = compat.compiles(model, model_kwargs, config)
        self.compile_config = config.compile_config if self.compiles else None
        self._ran: Counter[tuple] = Counter()  # in this generate
        self.warm = False  # whether the last pass had nothing to compile

    @property
    def widest(self) -> int:
        """Tokens of the widest pass that checks a draft."""
        return self.drafts.most + 1

    def padding(self, width: int) -> int:
        """Tokens that are read beside ``width`` drafted ones and the last, to keep the form."""
        return self.drafts.most - width if self.compiles and width else 0

    def __call__(self, kind: str, ids: Tensor, n_tokens: int, kwargs: dict[str, Any]):
        """A pass over the last tokens of ids: ``"draft"``, ``"verify"`` or ``"dense"``."""
        inputs = compat.inputs_of_step(self.model, ids, n_tokens, kwargs)
        cache = compat.find_cache(inputs)
        form = kind, None if cache is None else compat.capacity(cache)
        ran, before = self._ran[form], self.drafts.ran[form]
        self._ran[form], self.drafts.ran[form] = ran + 1, before + 1
        self.warm = before >= (WARM if self.compiles else 1)
        step = self._compiled(form) if self.compiles else _step
        held = step is not _step and compat.stays_compiled(cache)
        with self.drafts.as_kind(kind), held_after(ran if held else 0):
            try:
                return step(self.model, inputs)
            except compat.NOT_COMPILED as error:  # before anything of it has run
                self.drafts.forms[form] = _step
                why = str(error).strip().splitlines()[0][:200]
                warnings.warn(f"popmm: {kind} passes are not compiled: {why}", stacklevel=2)
                return _step(self.model, inputs)

    def _compiled(self, form: tuple) -> Callable:
        """The pass in one graph, so that none of its parts is compiled later than others."""
        forms = self.drafts.forms
        if form not in forms:
            forms[form] = compile_apart(_step, compat.compile_settings(self.compile_config), self.model.device)
        return forms[form]
