"""Draw the picture of docs/report.md: a screenshot of a run's report in chromium.

python scripts/report_picture.py runs/quickstart docs/pictures/report.png --row 441 --token chosen.19
"""

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

from tokenward.report.page import make_report

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--row", type=int, help="number of the pair on the page; by default the first one")
    parser.add_argument("--theme", default="light", choices=["light", "dark"])
    parser.add_argument("--token", default="", help="token whose card is open, such as chosen.4")
    arguments = parser.parse_args()
    page_path = make_report(arguments.run).save().resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1040}, color_scheme=arguments.theme)
        page.goto(page_path.as_uri())
        if arguments.row:
            page.evaluate("n => change({row: pairs.find(pair => pair.number === n).key})", arguments.row)
        if arguments.token:
            page.evaluate("token => { state.token = token; restoreToken(); }", arguments.token)
        page.screenshot(path=arguments.picture)
        browser.close()


if __name__ == "__main__":
    main()
