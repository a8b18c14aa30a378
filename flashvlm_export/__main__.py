"""``python -m flashvlm_export`` is ``flashvlm``."""

from flashvlm_export.cli import main

raise SystemExit(main())
