"""Pictures of the studio, from the running app: each tab in light and dark, wide and on a phone.

    python -m tests.studio.screenshots OUT

Starts a studio on the demo checkpoint; needs Chromium and playwright.
"""

import argparse
import re
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from .conftest import BROWSER, DEMO, FLAGS, WAIT_MS

SIZES = {"wide": {"width": 1440, "height": 900}, "phone": {"width": 390, "height": 844}}
PICTURES = DEMO / "pictures"


def chat(page: Page) -> None:
    box = page.get_by_role("textbox", name="Ask something")
    upload = page.locator(".question input[type=file]")
    upload.set_input_files(str(PICTURES / "shapes.png"))
    expect(page.locator(".attached .card")).to_have_count(1)
    for question in ("What colour is the star?", "Where is it?"):
        box.fill(question)
        box.press("Enter")
        expect(box).to_have_value("")
        expect(page.get_by_role("button", name="Submit").first).to_be_visible()
    upload.set_input_files([str(PICTURES / "pair1.png"), str(PICTURES / "pair2.png")])
    expect(page.locator(".attached .card")).to_have_count(2)
    box.fill("Which picture has a green triangle?")


def web(page: Page) -> None:
    page.get_by_role("tab", name="Page").click()
    page.get_by_placeholder("What should the page be?").fill(
        "A page for a painter. The name is Lumo. The title is red, the button is blue."
    )
    page.get_by_role("button", name="Write the page").click()
    expect(page.get_by_text("Done:")).to_be_visible()
    expect(page.frame_locator("iframe[title=preview]").frame_locator("iframe").get_by_text("painter")).to_be_visible()


def article(page: Page) -> None:
    page.get_by_role("tab", name="Article").click()
    page.get_by_role("gridcell", name="Write a story").or_(page.get_by_text("Write a story about Mira")).first.click()
    expect(page.get_by_placeholder("What should the article be about?")).to_have_value(re.compile("red circle"))
    page.get_by_role("button", name="Compose").click()
    expect(page.get_by_role("textbox", name=re.compile("^Paragraph"))).to_have_count(4)
    expect(page.locator(".steps .done")).to_have_count(4)


SCENES = {"chat": chat, "page": web, "article": article}


def take(address: str, out: Path) -> None:
    """Every scene in every size and colour scheme, as PNG files in `out`; and the empty tabs."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport=viewport, color_scheme=scheme, locale="en-GB")
                page = context.new_page()
                page.set_default_timeout(WAIT_MS)
                page.goto(address)
                page.wait_for_function("sessionStorage.getItem('xcomposer')")
                for name, scene in SCENES.items():
                    page.get_by_role("tab", name=name.capitalize(), exact=True).click()
                    page.screenshot(path=out / f"empty-{name}-{size}-{scheme}.png")
                    scene(page)
                    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
                    page.wait_for_timeout(600)  # transitions
                    page.screenshot(path=out / f"{name}-{size}-{scheme}.png", full_page=size == "phone")
                context.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--address", help="of a studio that runs already, on the demo checkpoint")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.address:
        take(args.address, args.out)
        return
    from xcomposer.loading import arguments, load
    from xcomposer.studio import app
    from xcomposer.studio.desk import About, Desk
    from xcomposer.studio.workspace import Workspaces

    model, _ = load(arguments("").parse_args(["--model", str(DEMO)]))
    workspaces = Workspaces()
    studio = app.build(Desk(model, About.of_folder(DEMO)), workspaces, PICTURES)
    _, address, _ = app.launch(studio, app.parse(["--port", "0"]), prevent_thread_lock=True, quiet=True)
    try:
        take(address, args.out)
    finally:
        studio.close()
        workspaces.close_all()


if __name__ == "__main__":
    main()
