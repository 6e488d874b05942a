"""``python -m hf_eff.cli``: the command ``hf-eff`` without its script."""

from __future__ import annotations

import sys

from hf_eff.cli import main

sys.exit(main())
