"""The studio as its visitors meet it: what a browser shows, on the demo checkpoint."""

import io
import json
import re
import zipfile
from importlib.util import find_spec

import pytest

from .conftest import DEMO, opened

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect  # noqa: E402

STAR, ASKED = DEMO / "pictures" / "shapes.png", "What colour is the star?"
PAGE = "A page for a painter. The name is Lumo. The title is red, the button is blue."
ARTICLE = "Write about Mira and a red cat."
TEXT_ONLY = "none: text only"
PACE, HELD = 1.0, 60.0  # seconds a token: enough to see some; until it is let go, however slow the machine


def box(page):
    return page.get_by_role("textbox", name=re.compile("Ask something|请提问"))


def attach(page, *files):
    page.locator(".question input[type=file]").set_input_files([str(file) for file in files])
    expect(page.locator(".question").get_by_role("button", name=re.compile("remove|clear", re.I))).to_have_count(
        len(files)
    )


def ask(page, question=ASKED, *files):
    if files:
        attach(page, *files)
    box(page).fill(question)
    box(page).press("Enter")


def sign_in(page, name, word):
    page.get_by_label("username").fill(name)
    page.get_by_label("password").fill(word)
    page.get_by_role("button", name="Login").click()


def stopped_within_a_token(page, slow):
    """An answer that was begun, and stopped while its next token is held; the model goes on with `slow(0.0)`."""
    slow(PACE)
    ask(page, "Who are you?")
    expect(answers(page)).to_contain_text("I")
    slow(HELD)
    button(page, "Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()


def answers(page):
    return page.locator(".conversation [data-testid=bot]")


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True).locator("visible=true").first


def write_page(page, instruction=PAGE):
    tab(page, "Page")
    page.get_by_placeholder("What should the page be?").fill(instruction)
    button(page, "Write the page").click()


def type_code(page, code):
    page.get_by_role("tab", name="Code").click()
    page.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(code)
    page.get_by_role("tab", name="Preview").click()


def inside(page):
    """The written page, in its two frames."""
    return page.frame_locator("iframe[title=preview]").frame_locator("iframe[title=page]")


def compose(page, instruction=ARTICLE, pictures=None):
    tab(page, "Article")
    page.get_by_placeholder("What should the article be about?").fill(instruction)
    if pictures is not None:
        page.get_by_label("Pictures in the article").click()
        page.get_by_role("option", name=pictures).click()
    button(page, "Compose").click()


def written(page, steps=1):
    """Wait for the article's steps."""
    expect(page.locator(".steps .done")).to_have_count(steps)
    expect(button(page, "Stop")).to_be_disabled()


def paragraphs(page):
    return page.get_by_role("textbox", name=re.compile("^Paragraph"))


def at_block(page, number, name):
    """A tool of a block, which shows when the block is under the pointer."""
    block = page.locator("#sheet .block").nth(number)
    block.hover()
    block.get_by_role("button", name=name, exact=True).click()


def slow_network(page, milliseconds):
    """From now on the page learns of every answer of the server so much later."""
    page.evaluate(
        "(late) => { const now = window.fetch; window.fetch = async (...request) => {"
        " const answer = await now(...request); await new Promise((done) => setTimeout(done, late)); return answer } }",
        milliseconds,
    )


def open_json(page, file):
    with page.expect_file_chooser() as chooser:
        button(page, "Open JSON").click()
    chooser.value.set_files(str(file))


def saved(page, name):
    """What a click on the button makes the browser save: (name, bytes)."""
    with page.expect_download() as download:
        button(page, name).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


class TestChat:
    def test_from_a_picture_to_a_file(self, visit):
        page = visit()
        ask(page, ASKED, STAR)
        expect(answers(page)).to_have_text("yellow")
        expect(page.locator(".conversation [data-testid=user] img[src*='.png']")).to_be_visible()
        expect(box(page)).to_have_value("")
        ask(page, "What shape is red?")
        expect(answers(page)).to_have_count(2)
        expect(page.get_by_role("radio", name=ASKED)).to_be_checked()
        page.get_by_role("button", name="Save and open").click()
        name, content = saved(page, "JSON")
        assert name == "conversation.json"
        turns = json.loads(content)["turns"]
        assert [turns[0]["question"], turns[0]["answer"]] == [ASKED, "yellow"]
        assert turns[0]["media"][0]["name"] == "shapes.png"

    def test_a_saved_conversation_opens_again(self, visit, tmp_path):
        file = tmp_path / "old.json"
        file.write_text(json.dumps({"version": 1, "turns": [{"question": "Hi?", "media": [], "answer": "Hello!"}]}))
        page = visit()
        page.get_by_role("button", name="Save and open").click()
        open_json(page, file)
        expect(answers(page)).to_have_text("Hello!")
        file.write_text("{}")
        open_json(page, file)
        expect(page.get_by_text("no conversation that the studio saved")).to_be_visible()
        expect(answers(page)).to_have_text("Hello!")

    def test_settings_are_left_as_they_are_or_chosen(self, visit):
        page = visit()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Temperature")).to_be_visible()
        ask(page, "Hello!")
        expect(answers(page)).to_have_text("Hello! How can I help you?")
        page.get_by_label("Longest answer, in tokens").fill("1")
        ask(page, "Hello!")
        expect(answers(page)).to_have_count(2)
        expect(answers(page).nth(1)).not_to_contain_text("How")
        page.get_by_label("Temperature").fill("hot")
        ask(page, "Hello!")
        expect(page.locator(".note.error").first).to_contain_text("Temperature: 'hot' is not a number from 0.01 to 10")
        expect(box(page)).to_have_value("Hello!")

    def test_clear_while_an_answer_is_written(self, visit, slow):
        page = visit()
        slow(PACE)
        ask(page, "Who are you?")
        expect(answers(page)).to_contain_text("I")
        slow(HELD)
        page.get_by_role("button", name="Clear").first.click()
        expect(answers(page)).to_have_count(0)
        slow(0.0)
        ask(page, "你好")
        expect(answers(page)).to_contain_text("你好")
        expect(answers(page)).to_have_count(1)
        expect(page.get_by_text("Who are you?")).to_have_count(0)

    def test_what_is_attached_is_counted_before_it_is_sent(self, visit):
        page = visit()
        attach(page, STAR, DEMO / "pictures" / "crowd.png")
        cards = page.locator(".attached .card")
        expect(cards).to_have_count(2)
        expect(cards.first).to_contain_text(re.compile(r"shapes.png tiles: \d+, tokens: \d+"))
        expect(page.locator(".attached .count")).to_contain_text(re.compile(r"[\d,]+ of [\d,]+ tokens"))

    def test_typed_html_stays_text(self, visit):
        page = visit()
        typed = "<button>press</button> <img src=x onerror=alert(1)> &lt;b&gt;"
        ask(page, typed)
        expect(answers(page)).to_have_count(1)
        message = page.locator(".conversation [data-testid=user]")
        expect(message).to_contain_text(typed)
        assert message.locator("button", has_text="press").count() == 0

    def test_stop_and_what_follows(self, visit, slow):
        page = visit()
        stopped_within_a_token(page, slow)
        slow(0.0)
        words = answers(page).inner_text()
        assert "very small one" not in words
        ask(page, "你好")
        expect(answers(page)).to_have_count(2)
        assert answers(page).first.inner_text() == words

    def test_a_question_right_after_a_stop(self, visit, slow):
        """The stopped answer is still at its last token when the next question comes."""
        page = visit()
        stopped_within_a_token(page, slow)
        ask(page, "你好")
        expect(page.get_by_text("Waiting for the model: 1 before you.")).to_be_visible()
        slow(0.0)
        expect(answers(page)).to_have_count(2)

    def test_undo_gives_the_question_back(self, visit):
        page = visit()
        ask(page, "Hello!")
        expect(answers(page)).to_contain_text("Hello! How can I help you?")
        button(page, "Undo").click()
        expect(answers(page)).to_have_count(0)
        expect(box(page)).to_have_value("Hello!")

    def test_a_turn_is_edited(self, visit):
        page = visit()
        ask(page, "Hello!")
        expect(answers(page)).to_contain_text("Hello! How can I help you?")
        button(page, "Edit").click()
        page.locator(".conversation textarea").fill("Who are you?")
        button(page, "Submit").click()
        expect(answers(page)).to_contain_text("I am InternLM-XComposer, a very small one.")
        expect(answers(page)).to_have_count(1)

    def test_a_broken_picture_and_an_empty_message(self, visit, tmp_path):
        broken = tmp_path / "holiday.png"
        broken.write_bytes(STAR.read_bytes()[:100])
        page = visit()
        box(page).press("Enter")
        expect(page.get_by_text("Write a question first.")).to_be_visible()
        ask(page, ASKED, broken)
        error = page.locator(".note.error").locator("visible=true")
        expect(error).to_contain_text("holiday.png")
        assert "/" not in error.inner_text()
        expect(box(page)).to_have_value(ASKED)
        expect(answers(page)).to_have_count(0)

    def test_a_picture_from_the_camera(self, visit):
        page = visit()
        page.get_by_role("button", name="Camera and address").click()
        page.get_by_role("button", name=re.compile("access webcam", re.I)).click()
        page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
        page.get_by_role("button", name="capture photo").click()
        expect(page.locator(".attached .card")).to_have_count(1)
        expect(page.locator(".attached .card")).to_contain_text(re.compile(r"tiles: \d+"))

    def test_a_file_over_the_limit_is_refused(self, visit, tmp_path):
        large = tmp_path / "large.png"
        large.write_bytes(STAR.read_bytes() + bytes(2**21))
        page = visit()
        page.locator(".question input[type=file]").set_input_files(str(large))
        expect(page.get_by_text(re.compile("exceed|too large|maximum", re.I)).first).to_be_visible()


class TestTogether:
    def test_two_at_once_each_get_their_own(self, visit):
        one, two = visit(), visit()
        ask(one, ASKED, STAR)
        ask(two, "你是谁？")
        expect(answers(one)).to_have_text("yellow")
        expect(answers(two)).to_have_text("我是浦语·灵笔，一个很小的模型。")
        expect(one.get_by_text("你是谁？")).to_have_count(0)

    def test_who_waits_sees_the_place_and_comes_in_after_a_stop(self, visit, slow):
        one, two = visit(), visit()
        slow(PACE)
        write_page(one)
        expect(one.get_by_text("characters so far")).to_be_visible()
        slow(HELD)
        ask(two, "Hello!")
        expect(two.get_by_text("Waiting for the model: 1 before you.")).to_be_visible()
        button(one, "Stop").click()
        expect(one.get_by_text("Stopped.", exact=True)).to_be_visible()
        slow(0.0)
        expect(answers(two)).to_contain_text("Hello! How can I help you?")

    def test_a_closed_page_frees_the_model(self, visit, slow):
        one, two = visit(), visit()
        slow(PACE)
        write_page(one)
        expect(one.get_by_text("characters so far")).to_be_visible()
        one.context.close()
        ask(two, "Hello!")
        expect(answers(two)).to_contain_text("Hello")
        slow(0.0)
        expect(answers(two)).to_contain_text("Hello! How can I help you?")

    def test_a_reload_finds_everything(self, visit):
        page = visit()
        ask(page, ASKED, STAR)
        expect(answers(page)).to_have_text("yellow")
        write_page(page)
        expect(page.get_by_text("Done:")).to_be_visible()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        page.reload()
        expect(answers(page)).to_have_text("yellow")
        tab(page, "Page")
        expect(inside(page).get_by_role("heading", name="Lumo")).to_be_visible()
        tab(page, "Article")
        expect(paragraphs(page).first).to_have_text("Mira has a red cat.")

    def test_a_reload_in_the_middle_keeps_what_was_written(self, visit, slow):
        page = visit()
        slow(0.3)
        compose(page, pictures=TEXT_ONLY)
        expect(paragraphs(page).first).to_contain_text("Mira")
        page.reload()
        slow(0.0)
        tab(page, "Article")
        expect(paragraphs(page).first).to_contain_text("Mira")
        expect(button(page, "Compose")).to_be_enabled()

    def test_a_forgotten_article_comes_back_from_the_browser(self, visit, workspaces):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        token = page.evaluate("sessionStorage.getItem('xcomposer')")
        while token in workspaces._open:
            workspaces.close(token)
        page.reload()
        tab(page, "Article")
        expect(paragraphs(page).first).to_have_text("Mira has a red cat.")


class TestPage:
    def test_from_an_instruction_to_a_file(self, visit):
        page = visit()
        write_page(page)
        expect(page.get_by_text("Done:")).to_be_visible()
        expect(inside(page).get_by_role("heading", name="Lumo")).to_be_visible()
        expect(page.get_by_role("radio", name=re.compile("^1. A page"))).to_be_checked()
        name, content = saved(page, "Download")
        assert name == "Lumo.html" and b"<h1>Lumo</h1>" in content

    def test_a_resume_gets_its_script(self, visit):
        page = visit()
        tab(page, "Page")
        page.get_by_role("tab", name="Résumé").click()
        page.get_by_label("Or write it here").fill((DEMO / "pictures" / "resume.md").read_text())
        button(page, "Write the page").click()
        expect(page.get_by_text("Done:")).to_be_visible()
        said = []
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.accept()))
        inside(page).get_by_role("button", name="Hello").click()
        assert said == ["Hello!"]

    def test_a_screenshot_becomes_a_page(self, visit):
        page = visit()
        tab(page, "Page")
        page.get_by_role("tab", name="Screenshot").click()
        button(page, "Write the page").click()
        expect(page.get_by_text("give a screenshot")).to_be_visible()
        page.locator(".screenshot input[type=file]").set_input_files(str(DEMO / "pictures" / "page.png"))
        expect(page.locator(".screenshot img")).to_be_visible()
        button(page, "Write the page").click()
        expect(inside(page).locator("section").first).to_have_text("Card")

    def test_the_preview_follows_the_code_and_versions_come_back(self, visit):
        page = visit()
        write_page(page)
        expect(page.get_by_text("Done:")).to_be_visible()
        type_code(page, "<h1>By hand</h1>")
        expect(inside(page).get_by_role("heading", name="By hand")).to_be_visible()
        page.get_by_role("radio", name=re.compile("^1. A page")).check(force=True)
        expect(inside(page).get_by_role("heading", name="Lumo")).to_be_visible()

    def test_a_change_is_a_new_version(self, visit):
        page = visit()
        tab(page, "Page")
        change = page.get_by_placeholder("What should be different?")
        change.fill("The title is green.")
        button(page, "Change").click()
        expect(page.get_by_text("Write a page first")).to_be_visible()
        write_page(page)
        expect(page.get_by_text("Done:")).to_be_visible()
        button(page, "Change").click()
        expect(page.get_by_role("radio", name=re.compile("^2. The title is green"))).to_be_checked()

    def test_a_script_reaches_neither_the_app_nor_the_network(self, visit, address):
        page = visit()
        tab(page, "Page")
        type_code(
            page,
            "<h1>x</h1><script>const h = document.querySelector('h1'), tries = [];"
            "for (const f of [() => parent.document.title, () => top.document.title, () => localStorage.length,"
            " () => document.cookie]) { try { f(); tries.push('got') } catch (e) { tries.push('no') } }"
            f"fetch('{address}config').then(() => tries.push('got'), () => tries.push('no')).then(() => "
            f"{{ h.textContent = tries.join(' '); h.onclick = () => {{ location = '{address}' }} }})</script>",
        )
        heading = inside(page).get_by_role("heading")
        expect(heading).to_have_text("no no no no no")
        heading.click()  # the page tries to leave
        expect(heading).to_have_count(0)
        assert not [frame.url for frame in page.frames[1:] if frame.url.startswith(address)]

    def test_hosts_are_named_and_allowed(self, visit):
        page = visit()
        tab(page, "Page")
        type_code(page, '<h1>t</h1><script src="https://cdn.example/tailwind.js"></script>')
        expect(page.get_by_text("The page wants to load from: cdn.example")).to_be_visible()
        assert "https://cdn.example;" not in page.locator("iframe[title=preview]").get_attribute("srcdoc")
        button(page, "Allow just these").click()
        expect(page.get_by_text("The page wants to load from")).to_be_hidden()
        assert "https://cdn.example;" in page.locator("iframe[title=preview]").get_attribute("srcdoc")


class TestArticle:
    def test_from_a_sentence_to_files(self, visit):
        page = visit()
        compose(page)
        written(page, steps=4)
        expect(page.get_by_role("textbox", name="Title")).to_have_text("Mira and the red cat")
        expect(paragraphs(page)).to_have_count(3)
        name, content = saved(page, "Markdown")
        assert name == "Mira and the red cat.zip"
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert "Mira has a red cat." in archive.read("Mira and the red cat.md").decode()

    def test_the_example_brings_its_pictures_and_they_stand_where_they_belong(self, visit):
        page = visit()
        tab(page, "Article")
        page.get_by_text("Write a story about Mira").first.click()
        expect(page.get_by_placeholder("What should the article be about?")).to_have_value(re.compile("blue star"))
        expect(page.locator(".gallery-item, .thumbnail-item").first).to_be_visible()
        button(page, "Compose").click()
        written(page, steps=4)
        with zipfile.ZipFile(io.BytesIO(saved(page, "Markdown")[1])) as archive:
            text = archive.read("The day of Mira.md").decode()
            shown = [archive.read(name) for name in re.findall(r"!\[[^]]*\]\(<([^>]+)>\)", text)]
        files = [DEMO / "pictures" / "candidates" / f"{name}.png" for name in ("red-circle", "blue-star")]
        assert shown == [file.read_bytes() for file in files]
        places = [text.index(part) for part in ("a red circle in the park", "![", "a blue star at the lake")]
        assert places == sorted(places) and text.rindex("![") > places[-1]

    def test_every_other_file(self, visit):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        files = {"HTML": b"<!DOCTYPE html>", "DOCX": b"PK", "JSON": b"{"}
        if find_spec("weasyprint"):
            files["PDF"] = b"%PDF-"
        for name, start in files.items():
            assert saved(page, name)[1].startswith(start)
            page.mouse.move(10, 10)

    def test_typing_moving_deleting_and_back(self, visit):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        typed = "Mira has <b>two</b> cats."
        paragraphs(page).first.fill(typed)
        page.get_by_role("textbox", name="Title").click()
        expect(button(page, "Undo")).to_be_enabled()
        at_block(page, 0, "Down")
        expect(paragraphs(page).nth(1)).to_have_text(typed)
        at_block(page, 0, "Delete")
        expect(paragraphs(page)).to_have_count(2)
        button(page, "Undo").click()
        expect(paragraphs(page)).to_have_count(3)
        button(page, "Undo").click()
        expect(paragraphs(page).first).to_have_text(typed)
        paragraphs(page).first.press("Control+z")
        expect(paragraphs(page).first).to_have_text("Mira has a red cat.")
        button(page, "Redo").click()
        expect(paragraphs(page).first).to_have_text(typed)

    def test_what_is_typed_while_the_server_is_slow_stays(self, visit):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        slow_network(page, 1000)
        paragraphs(page).first.fill("Mira has two cats.")
        at_block(page, 2, "Delete")  # an act of its own, while what was typed is still being told
        expect(paragraphs(page)).to_have_count(2)
        expect(paragraphs(page).first).to_have_text("Mira has two cats.")
        paragraphs(page).first.fill("Mira has three cats.")
        paragraphs(page).nth(1).click()
        page.keyboard.press("End")
        page.keyboard.insert_text(" It is")
        page.wait_for_function("JSON.parse(localStorage.getItem('xcomposer-article')).blocks[0].text.includes('three')")
        page.keyboard.insert_text(" warm.")
        page.get_by_role("textbox", name="Title").click()
        page.wait_for_function("localStorage.getItem('xcomposer-article').includes(' It is warm.')")
        page.reload()
        tab(page, "Article")
        expect(paragraphs(page).first).to_have_text("Mira has three cats.")
        expect(paragraphs(page).nth(1)).to_have_text(re.compile(" It is warm.$"))

    def test_an_edit_stands_beside_the_old_text_until_it_is_kept(self, visit):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        at_block(page, 0, "Rewrite")
        note = page.get_by_placeholder("A note for the model")
        note.fill("a blue dog")
        note.press("Enter")
        expect(button(page, "Keep")).to_be_visible()
        expect(page.locator(".ghost .old")).to_contain_text("Mira has a red cat.")
        button(page, "Discard").click()
        expect(paragraphs(page).first).to_have_text("Mira has a red cat.")
        at_block(page, 0, "Shorten")
        expect(button(page, "Keep")).to_be_visible()
        new = page.locator(".ghost .new p").inner_text()
        button(page, "Keep").click()
        expect(paragraphs(page).first).to_have_text(new)

    def test_a_picture_by_hand(self, visit):
        page = visit()
        compose(page, pictures=TEXT_ONLY)
        written(page)
        at_block(page, 0, "Picture here")
        expect(page.get_by_text("No picture yet")).to_be_visible()
        with page.expect_file_chooser() as chooser:
            at_block(page, 1, "Upload")
        chooser.value.set_files(str(STAR))
        picture = page.locator("#sheet figure img")
        expect(picture).to_be_visible()
        page.get_by_role("textbox", name="Caption").fill("A star & more")
        page.get_by_role("textbox", name="Title").click()
        expect(picture).to_have_attribute("alt", "A star & more")
        _, content = saved(page, "HTML")
        assert b"A star &amp; more" in content and b"data:image/png;base64," in content

    def test_stop_keeps_what_is_written(self, visit, slow):
        page = visit()
        slow(PACE)
        compose(page)
        expect(paragraphs(page).first).to_contain_text("Mira")
        slow(HELD)
        button(page, "Stop").click()
        expect(page.get_by_text("Stopped.", exact=True)).to_be_visible()
        slow(0.0)
        expect(paragraphs(page).first).to_contain_text("Mira")
        expect(button(page, "Stop")).to_be_disabled()
        expect(page.locator(".steps .on")).to_have_count(0)

    def test_its_json_opens_again_and_lost_pictures_are_asked_for(self, visit, tmp_path):
        blocks = [{"id": "b1", "text": "One."}, {"id": "b2", "kind": "picture", "picture": "gone", "caption": "c"}]
        file = tmp_path / "article.json"
        file.write_text(json.dumps({"version": 1, "title": "Old", "instruction": "x", "blocks": blocks}))
        page = visit()
        tab(page, "Article")
        open_json(page, file)
        expect(paragraphs(page)).to_have_text(["One."])
        expect(page.get_by_text("Pictures that are not here any more: 1.")).to_be_visible()


class TestSignIn:
    def test_nothing_is_shown_or_served_without_it(self, visit, paced, workspaces):
        with opened(paced, workspaces, "--auth", "me:se:cret") as address:
            page = visit(address, signed_in=False)
            for name, word in (("me", "wrong"), ("you", "se:cret")):
                sign_in(page, name, word)
                expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
                expect(page.get_by_role("tab")).to_have_count(0)
                page.reload()
            sign_in(page, "me", "se:cret")
            expect(page.get_by_role("tab", name="Chat")).to_be_visible()
            page.wait_for_function("sessionStorage.getItem('xcomposer')")
            ask(page, ASKED, STAR)
            expect(answers(page)).to_have_text("yellow")
            picture = page.locator(".conversation [data-testid=user] img").get_attribute("src")
            stranger = page.context.browser.new_context().request
            for path in (picture, f"{address}config", f"{address}gradio_api/info", f"{address}gradio_api/queue/data"):
                assert stranger.get(path).status == 401, path
            assert stranger.post(f"{address}gradio_api/upload").status == 401
            assert page.context.request.get(picture).ok


class TestEndpoint:
    def test_each_tab_by_a_server(self, visit, served, workspaces):
        pytest.importorskip("openai")
        from xcomposer.studio.endpoint import Endpoint

        with opened(Endpoint(served), workspaces) as address:
            page = visit(address)
            ask(page, ASKED, STAR)
            expect(answers(page)).to_have_text("yellow")
            write_page(page)
            expect(page.get_by_text("Done:")).to_be_visible()
            expect(inside(page).get_by_role("heading", name="Lumo")).to_be_visible()
            compose(page)
            written(page, steps=4)
            expect(paragraphs(page).first).to_have_text("Mira has a red cat.")
            at_block(page, 0, "Shorten")
            expect(button(page, "Keep")).to_be_visible()


class TestLooks:
    def test_chinese(self, visit):
        page = visit(locale="zh-CN")
        expect(page.get_by_role("tab", name="网页")).to_be_visible()
        page.get_by_text("English", exact=True).click()
        expect(page.get_by_role("tab", name="Page")).to_be_visible()
        page.get_by_text("中文", exact=True).click()
        expect(page.get_by_role("tab", name="文章")).to_be_visible()
        ask(page, "你好")
        expect(answers(page)).to_contain_text("你好")

    @pytest.mark.parametrize("name", ["Chat", "Page", "Article"])
    def test_a_phone_needs_no_sideways_scrolling(self, visit, name):
        page = visit(viewport={"width": 390, "height": 844})
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
