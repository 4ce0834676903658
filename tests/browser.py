"""A headless browser for the tests of pages."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NARROW = 400  # pixels


def seen_by_browser(wrapper: Path, profile: Path, *options: str) -> tuple[Any, str]:
    """The JSON that the page `wrapper` puts into its <pre>, and what the browser said on the way."""
    options = ["--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--hide-scrollbars", *options]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={profile}", "--dump-dom"]
    command = [BROWSER, *options, wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(re.search("<pre>(.+)</pre>", done.stdout)[1])), done.stderr
