"""What each process of `fresh_processes` would do anew: the one that they are forked from imports this, last."""

from __future__ import annotations

import contextlib
import gc
import importlib

with contextlib.suppress(ImportError):  # 0.1 s of CPU for each that has PostgreSQL
    importlib.import_module("sqlalchemy.dialects.postgresql.psycopg")
    importlib.import_module("psycopg.types.string")
gc.collect()
gc.freeze()  # what is shared stays as it is
