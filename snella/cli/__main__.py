"""``python -m snella.cli`` is ``snella``."""

from snella.cli.main import main

raise SystemExit(main())
