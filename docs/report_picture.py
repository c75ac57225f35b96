"""Takes the picture of docs/report.md: the page of a run as a phone and as a desktop show it. Needs Chromium.

python docs/report_picture.py runs/digits_bcp
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lirpa_ext.analysis.gather import gather

PATH = Path(__file__).parent / "pictures" / "report.png"
BOTH = """<!DOCTYPE html><body style="margin:16px;background:#889;display:flex;gap:16px">
<iframe src="page.html" style="width:360px;height:1040px;border:0"></iframe>
<iframe src="page.html" style="width:860px;height:1040px;border:0"></iframe>"""


def main(run: str) -> None:
    """Write the page, load it twice, and take the picture."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        gather(run).write(Path(folder) / "page.html")
        (Path(folder) / "both.html").write_text(BOTH, encoding="utf-8")
        PATH.parent.mkdir(exist_ok=True)
        command = [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1270,1072",
            f"--user-data-dir={folder}/profile", f"--screenshot={PATH}", (Path(folder) / "both.html").as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main(sys.argv[1])
