"""transformers' own server (``transformers serve``), as popmm serves with it.

Most of what is built on is private to transformers: ``check_parts`` looks at it before a model is loaded. Needs the
packages of ``popmm[serve]``, so nothing but ``popmm.serving`` imports this.
"""

from __future__ import annotations

import transformers

try:
    from popmm.compat.serving.app import Models, build_app, check_parts, takes_batches
    from popmm.compat.serving.batched import Batched
    from popmm.compat.serving.engine import error_body
    from popmm.compat.serving.plain import Plain
except (ImportError, AttributeError) as error:  # what check_parts looks at is named when it is imported
    raise RuntimeError(
        f"popmm serve builds on transformers' own server, and that of transformers {transformers.__version__} lacks a "
        f"part or a package ({error}): use transformers 5.17 to 5.24, and pip install 'popmm[serve]'"
    ) from error

__all__ = ["Batched", "Models", "Plain", "build_app", "check_parts", "error_body", "takes_batches"]
