"""Draw the picture of README.md and docs/report.md: the first screen of a run's report in chromium.

python scripts/report_picture.py runs/quickstart docs/pictures/report.png
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
    parser.add_argument(
        "--row", type=int, help="number of the pair; by default the one that the page opens with"
    )
    parser.add_argument("--theme", default="light", choices=["light", "dark"])
    parser.add_argument("--token", default="", help="token whose card is open, such as chosen.4")
    arguments = parser.parse_args()
    page_path = make_report(arguments.run).save().resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(
            viewport={"width": 1200, "height": 1040}, color_scheme=arguments.theme, device_scale_factor=1.5
        )
        page.goto(page_path.as_uri())
        if arguments.row:
            page.evaluate("n => change({row: pairs.find(pair => pair.number === n).key})", arguments.row)
        if arguments.token:
            page.evaluate("token => { state.token = token; restoreToken(); }", arguments.token)
        below = page.locator("#heading").bounding_box()
        assert below is not None
        clip = {"x": 0, "y": 0, "width": 1200, "height": below["y"]}
        page.screenshot(path=arguments.picture, clip=clip)
        browser.close()


if __name__ == "__main__":
    main()
