"""Makes ``lm_eval --model popmm`` known to lm-evaluation-harness, which has no plug-ins of its own.

``popmm-lm-eval.pth`` imports this at start-up, so it loads nothing and waits: when the harness' list of models has been
loaded, the name ``popmm`` is added to it. ``popmm.evaluation.harness`` itself is loaded when somebody asks for it.
"""

import sys


class AddsPopmm:
    """An import finder that waits for ``lm_eval.models``, and goes away then."""

    asking = False

    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models" or self.asking:
            return None
        from importlib.util import find_spec

        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        load = spec.loader.exec_module

        def load_and_add(module):
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            from lm_eval.api import registry

            models = getattr(registry, "model_registry", None)  # since 0.4.10
            if models is not None and "popmm" not in models:
                models.register("popmm", target="popmm.evaluation.harness:PopLM")

        spec.loader.exec_module = load_and_add
        return spec


if not any(type(finder).__name__ == "AddsPopmm" for finder in sys.meta_path):
    sys.meta_path.insert(0, AddsPopmm())
