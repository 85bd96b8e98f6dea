"""The studio's logic, without gradio and without a browser."""

import json
import sys
import threading

import pytest
from PIL import Image

from xcomposer.article import Article
from xcomposer.studio import app
from xcomposer.studio.conversation import Conversation, Turn, as_typed, asked, from_json, marked, to_json, to_markdown
from xcomposer.studio.desk import About, Choices, Desk
from xcomposer.studio.draft import Draft, Ghost
from xcomposer.studio.frame import code_of, hosts_of, policy, preview, sandboxed, title_of
from xcomposer.studio.line import Line, Now, Work
from xcomposer.studio.media import read_media, strip_of
from xcomposer.studio.pages import Pages, Version
from xcomposer.studio.texts import TEXTS, text
from xcomposer.studio.workspace import Workspaces

from .conftest import DEMO

STAR = DEMO / "pictures" / "shapes.png"


@pytest.fixture
def store():
    made = Workspaces()
    yield made
    made.close_all()


def media_of(folder, source=STAR):
    return read_media(source, folder)


class TestConversation:
    @pytest.mark.parametrize(
        "text, count, wanted",
        [
            ("What?", 0, "What?"),
            ("What?", 2, "<ImageHere><ImageHere>What?"),
            ("A <ImageHere> B", 1, "A <ImageHere> B"),
            ("A <ImageHere> B", 2, "<ImageHere><ImageHere>A  B"),
            ("A <ImageHere>", 0, "A "),
        ],
    )
    def test_marks(self, text, count, wanted):
        assert marked(text, count) == wanted

    def test_a_single_picture_goes_unmarked_and_marks_in_answers_are_dropped(self, tmp_path):
        turns = [Turn("What?", [media_of(tmp_path)], "A <ImageHere>star"), Turn("More")]
        query, history, pictures = asked(turns)
        assert (query, history, len(pictures)) == ("More", [("What?", "A star")], 1)
        turns.append(Turn("And this?", [media_of(tmp_path)]))
        turns[1].answer = "no"
        query, history, pictures = asked(turns)
        assert history[0][0] == "<ImageHere>What?" and query == "<ImageHere>And this?" and len(pictures) == 2

    @pytest.mark.parametrize(
        "typed, shown",
        [
            ("<b>x</b>", "&lt;b>x&lt;/b>"),
            ("a & b &lt;", "a &amp; b &amp;lt;"),
            ("`<b>` <b>", "`<b>` &lt;b>"),
            ("```\n<b>\n``` <i>", "```\n<b>\n``` &lt;i>"),
            ("```html\n<b>", "```html\n<b>"),
        ],
    )
    def test_html_is_shown_as_typed(self, typed, shown):
        assert as_typed(typed) == shown

    def test_json_both_ways(self, tmp_path):
        conversation = Conversation(turns=[Turn("What?", [media_of(tmp_path)], "A star."), Turn("你好", [], "好")])
        back = from_json(to_json(conversation), tmp_path, read_media)
        assert [(turn.question, turn.answer) for turn in back.turns] == [("What?", "A star."), ("你好", "好")]
        assert back.turns[0].media[0].name == "shapes.png"
        assert "> [shapes.png] What?" in to_markdown(back)

    @pytest.mark.parametrize(
        "wrong",
        [
            "", "[]", "{}", '{"version": 2, "turns": []}', '{"version": 1, "turns": [1]}',
            '{"version": 1, "turns": [{"question": 1, "answer": "", "media": []}]}',
            '{"version": 1, "turns": [{"question": "", "answer": "", "media": [{"name": "a", "data": "!"}]}]}',
            '{"version": 1, "turns": [{"question": "", "answer": "", "media": [{"name": 1, "data": ""}]}]}',
        ],
    )  # fmt: skip
    def test_other_files_are_refused(self, wrong, tmp_path):
        with pytest.raises(ValueError, match="no conversation that the studio saved"):
            from_json(wrong, tmp_path, read_media)

    def test_a_pictures_name_in_json_writes_nowhere_else(self, tmp_path):
        row = {"question": "q", "answer": "a", "media": [{"name": "../../x.png", "data": "AAAA"}]}
        inner = tmp_path / "a" / "b"
        inner.mkdir(parents=True)
        with pytest.raises(ValueError):
            from_json(json.dumps({"version": 1, "turns": [row]}), inner, read_media)
        assert not list(tmp_path.glob("*.png"))


class TestMedia:
    def test_errors_name_the_file_and_no_path(self, tmp_path):
        broken = tmp_path / "holiday.png"
        broken.write_bytes(STAR.read_bytes()[:90])
        with pytest.raises(ValueError, match="holiday.png") as caught:
            read_media(broken, tmp_path)
        assert str(tmp_path) not in str(caught.value)

    def test_a_video_has_frames_with_times(self, tmp_path):
        clip = tmp_path / "clip.gif"
        frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
        frames[0].save(clip, save_all=True, append_images=frames[1:], duration=1000)
        shown = strip_of([read_media(clip, tmp_path)], ["3 frames"])
        if "<figcaption>" in shown:
            assert "0:01.0" in shown and "0:02.0" in shown
        assert "clip.gif" in shown

    def test_names_are_text(self, tmp_path):
        named = tmp_path / "<img onerror=x>.png"
        named.write_bytes(STAR.read_bytes())
        assert "&lt;img onerror=x&gt;.png" in strip_of([read_media(named, tmp_path)], [""])


class TestFrame:
    def test_the_page_is_data_in_both_frames(self):
        shown = preview('</iframe><script>alert("x")</script>')
        assert "<script>" not in shown and shown.count("<iframe") == 1
        assert sandboxed("</iframe><b>").count("</iframe>") == 1

    def test_nothing_is_allowed_but_what_is_named(self):
        assert "http" not in policy() and "connect-src" not in policy()
        assert policy(("a.example",)).count("https://a.example") == 4
        assert "allow-same-origin" not in preview("x")

    @pytest.mark.parametrize(
        "page, hosts",
        [
            ('<img src="https://picsum.photos/2">', ["picsum.photos"]),
            ("<script src=//cdn.example:8080/x></script>", ["cdn.example:8080"]),
            ("<style>a{background:url('http://A.example/x')}@import \"https://b.example/c\"</style>",
             ["a.example", "b.example"]),
            ('<a href="#x">no</a><img src="data:image/png;base64,//">', []),
        ],
    )  # fmt: skip
    def test_hosts(self, page, hosts):
        assert hosts_of(page) == hosts

    @pytest.mark.parametrize(
        "page, title", [("<title>A &amp; B</title><h1>C</h1>", "A & B"), ("<h1>C <b>d</b></h1>", "C d"), ("x", "")]
    )
    def test_title(self, page, title):
        assert title_of(page) == title

    def test_a_fence_is_no_part_of_the_page(self):
        assert code_of("```html\n<p>\n```") == "<p>"
        assert code_of("<p>```</p>") == "<p>```</p>"


class TestPages:
    def test_versions_and_edits_by_hand(self):
        pages = Pages()
        assert pages.now is None and pages.history() == []
        pages.add(Version("<p>1", "a page"))
        pages.edited("<p>2")
        pages.edited("<p>3")
        pages.edited("<p>3")
        pages.add(Version(" "))
        assert [version.code for version in pages.versions] == ["<p>1", "<p>3"]
        assert pages.history() == [("a page", "<p>3")]
        pages.at = 0
        pages.edited("<p>4")
        assert [version.code for version in pages.versions] == ["<p>1", "<p>3", "<p>4"]


class TestDraft:
    def draft(self):
        article, _ = Article(title="T").with_text("one")
        article, _ = article.with_text("two")
        return Draft(article)

    def test_every_action_can_be_undone(self):
        draft = self.draft()
        steps = [
            ("text", "b1", {"text": "ONE"}), ("down", "b1", {}), ("up", "b1", {}), ("place", "b1", {}),
            ("caption", "b3", {"text": "c\nd"}), ("paragraph", "", {}), ("delete", "b2", {}),
            ("title", "", {"text": "U"}),
        ]  # fmt: skip
        seen = [draft.now]
        for do, block, values in steps:
            draft.act(do, block, **values)
            seen.append(draft.now)
        assert draft.now.block("b3").caption == "c d"
        for article in reversed(seen[:-1]):
            draft.undo()
            assert draft.now == article
        draft.undo()
        for article in seen[1:]:
            draft.redo()
            assert draft.now == article

    @pytest.mark.parametrize(
        "do, block, values",
        [
            ("text", "b9", {}), ("format", "b1", {}), ("text", "b1", {"text": 5}), ("pick", "b1", {"picture": "x"}),
            ("caption", "b1", {"text": "x"}), ("__class__", "b1", {}),
        ],
    )  # fmt: skip
    def test_what_a_browser_makes_up_is_refused(self, do, block, values):
        draft = self.draft()
        with pytest.raises(ValueError):
            draft.act(do, block, **values)
        assert draft.now == self.draft().now and not draft.past

    def test_an_edit_waits_for_a_yes(self):
        draft = self.draft()
        edited = draft.now.changed("b1", text="new")
        draft.ghost = Ghost(edited, "b1", "rewrite", done=True)
        draft.keep(False)
        assert draft.now == self.draft().now and draft.ghost is None
        draft.ghost = Ghost(edited, "b1", "rewrite", done=True)
        draft.keep(True)
        assert draft.now == edited
        draft.undo()
        assert draft.now == self.draft().now


class TestWorkspaces:
    def test_a_token_finds_its_own_and_nothing_else(self, store):
        mine = store.open()
        assert store.open(mine.token) is mine and store[mine.token] is mine
        for made_up in ("", "x" * 32, "../" * 11, mine.token + "x", None):
            assert store.open(made_up) is not mine
        with pytest.raises(ValueError, match="reload"):
            store["unknown"]

    def test_the_last_page_takes_the_files_with_it(self, store):
        mine = store.open()
        kept = mine.media(str(STAR))
        store.open(mine.token)
        store.close(mine.token)
        assert kept.path.is_file()
        store.close(mine.token)
        assert not kept.path.exists() and not mine.folder.exists()
        store.close(mine.token)

    def test_work_that_was_left_behind_is_known(self, store):
        mine = store.open()
        kept = []
        first, second = (Work(iter, lambda number=number: kept.append(number)) for number in (1, 2))
        assert mine.take("chat") is None
        mine.begin("chat", first)
        assert mine.take("chat") is first and mine.take("chat") is None
        mine.begin("chat", second)
        assert first.left and kept == [1] and not mine.end("chat", first)
        assert mine.take("chat") is second and mine.end("chat", second) and not mine.end("chat") and kept == [1, 2]
        assert not second.left

    def test_a_page_that_is_gone_leaves_its_work(self, store):
        mine, work = store.open(), Work(iter)
        mine.begin("page", work)
        mine.leave()
        assert work.left and not mine.running
        mine.begin("page", other := Work(iter))
        store.close(mine.token)
        assert other.left


class TestLine:
    """Who waits for the model; each turn here is stepped by hand."""

    def test_first_come_first_served(self):
        line = Line()
        one = line.turn(Work(iter), lambda: (value for value in "ab"), 0)
        assert next(one) == Now(None, 0, True)  # the model is being loaded
        line.open()
        assert next(one).value == "a"
        two, three = (line.turn(Work(iter), lambda: (value for value in "x"), 0) for _ in range(2))
        assert [next(two).before, next(three).before] == [1, 2]
        assert [now.value for now in one] == ["b"]
        assert next(two).value == "x" and next(three).before == 1
        two.close()
        assert [now.value for now in three] == ["x"]

    def test_who_is_stopped_leaves_the_line_and_the_model(self):
        line, closed = Line(), []

        def values():
            try:
                yield from range(9)
            finally:
                closed.append(True)

        line.open()
        served, waits = Work(iter), Work(iter)
        one, two = line.turn(served, values, 0), line.turn(waits, values, 0)
        assert next(one).value == 0 and next(two).before == 1
        waits.left = True
        assert list(two) == [] and not closed
        served.left = True
        assert list(one) == [] and closed
        assert next(line.turn(Work(iter), values, 0)).value == 0

    def test_a_line_that_is_too_long_and_work_that_fails(self):
        line = Line(most=1)
        line.open()
        one, two = (line.turn(Work(iter), lambda: (value for value in "ab"), 0) for _ in range(2))
        next(one), next(two)
        with pytest.raises(ValueError, match="1 are waiting for the model already"):
            next(line.turn(Work(iter), lambda: (value for value in "c"), 0))
        one.close(), two.close()

        def fails():
            raise ValueError("too long")

        with pytest.raises(ValueError, match="too long"):
            next(line.turn(Work(iter), fails, 0))
        assert [now.value for now in line.turn(Work(iter), lambda: (value for value in "c"), 0)] == ["c"]


class TestTexts:
    def test_every_text_is_in_both_languages_with_the_same_holes(self):
        for key, (english, chinese) in TEXTS.items():
            assert english and chinese, key
            assert english.count("{") == chinese.count("{"), key
        assert text("undo", "中文") == text("undo", "zh") == "撤销"


class TestDrawer:
    """The settings as a visitor types them."""

    def test_what_is_empty_is_the_default(self):
        shell = pytest.importorskip("xcomposer.studio.shell")
        assert shell.choices_of([True, "", None, " ", "", "", "", ""], "en") == Choices(exact=True)
        given = shell.choices_of([False, "7", "2", "0.5", "0.9", "1.2", "9", "64"], "en")
        assert given == Choices(False, 7, 2, 0.5, 0.9, 1.2, 9, 64)

    @pytest.mark.parametrize(
        "at, value, said",
        [
            (1, "1.5", "Seed: '1.5' is not a whole number"),
            (2, "17", "Beams: '17' is not a whole number from 1 to 16"),
            (3, "hot", "Temperature: 'hot' is not a number from 0.01 to 10"),
            (3, "nan", "Temperature: 'nan' is not a number"),
            (4, "1.1", "Top-p: '1.1' is not a number from 0.01 to 1"),
            (6, "0", "(hd_num): '0' is not a whole number from 1 to 64"),
            (7, "99999", "'99999' is not a whole number from 1 to 32,768"),
        ],
    )
    def test_what_is_no_such_number_is_named(self, at, value, said):
        shell = pytest.importorskip("xcomposer.studio.shell")
        values = [True, *[""] * 7]
        values[at] = value
        with pytest.raises(ValueError) as raised:
            shell.choices_of(values, "en")
        assert said in str(raised.value)


class TestDesk:
    @pytest.fixture
    def desk(self, demo_model):
        return Desk(demo_model, About.of_folder(DEMO))

    def test_answers_as_chat_does(self, desk, demo_model, tmp_path):
        turns = [Turn("What colour is the star?", [media_of(tmp_path)])]
        answers = list(desk.answer(turns, Choices(exact=True)))
        assert answers[-1] == "yellow"
        assert list(desk.answer(turns, Choices(exact=True, beams=2)))[-1] == "yellow"

    def test_a_seed_repeats_an_answer_with_beams_too(self, desk):
        for beams in (1, 2):
            choices = Choices(seed=5, beams=beams, temperature=3.0, length=12)
            first, second = ([*desk.answer([Turn("Hello!")], choices)][-1] for _ in range(2))
            assert first == second

    def test_pages_of_each_kind(self, desk, tmp_path):
        exact = Choices(exact=True)
        resume = (DEMO / "pictures" / "resume.md").read_text()
        page = media_of(tmp_path, DEMO / "pictures" / "page.png")
        *_, last = desk.page(
            "instruction",
            "A page for a painter. The name is Lumo. The title is red, the button is blue.",
            None,
            [],
            exact,
        )
        assert "Lumo" in last
        *_, last = desk.page("resume", resume, None, [], exact)
        assert "Gorine" in last and "<script>" in last
        *_, last = desk.page("screenshot", "", page, [], exact)
        assert "<section>" in last
        for kind, remedy in (("instruction", "say what"), ("resume", "Markdown"), ("screenshot", "screenshot")):
            with pytest.raises(ValueError, match=remedy):
                desk.page(kind, " ", None, [], exact)

    def test_beams_stop_when_their_reader_leaves(self, desk, demo_model):
        before = {thread.ident for thread in threading.enumerate()}
        pages = desk.page("instruction", "A page.", None, [], Choices(exact=True, beams=2, length=4000))
        assert next(pages) == ""
        pages.close()
        for thread in threading.enumerate():
            if thread.ident not in before and thread.name == "studio":
                thread.join(30)
                assert not thread.is_alive()

    def test_who_comes_before_the_model_waits_for_it(self, demo_model):
        desk, got = Desk(None, About("x")), []
        thread = threading.Thread(target=lambda: got.append(desk.model))
        thread.start()
        turn = desk.line.turn(Work(iter), lambda: desk.answer([Turn("Hello!")], Choices(exact=True)), 0)
        assert next(turn) == Now(None, 0, True) and not got
        desk.open(demo_model)
        thread.join(30)
        assert got == [demo_model]
        *_, last = turn
        assert last.value == "Hello! How can I help you?"

    def test_a_prompt_is_counted_as_the_model_counts_it(self, desk, demo_model, tmp_path):
        turns = [Turn("Hello", [], "Hi"), Turn("What?", [media_of(tmp_path)])]
        sizes, whole, limit = desk.count(turns, Choices())
        query, history, pictures = asked(turns)
        from xcomposer.model.prompting_internlm_xcomposer2 import CHAT_SYSTEM, chat_prompt

        opened = demo_model._open(demo_model.tokenizer, chat_prompt(query, history, CHAT_SYSTEM), pictures, None)
        assert whole == len(opened.prompt.input_ids) < limit
        assert sizes[0][1] == opened.prompt.image_spans[0][1] - opened.prompt.image_spans[0][0]

    def test_about(self, tmp_path):
        about = About.of_folder(DEMO)
        assert all((DEMO / name).is_file() for each in about.chat + about.article for name in each["files"])
        assert About.of_folder(tmp_path).chat == []
        (tmp_path / "studio.json").write_text('{"colour": 1}')
        with pytest.raises(ValueError, match="studio.json cannot be read"):
            About.of_folder(tmp_path)


class TestOptions:
    @pytest.mark.parametrize(
        "wrong, said",
        [
            (["--port", "70000"], "--port 70000"),
            (["--auth", "me"], "USER:PASSWORD"),
            (["--auth", ":x"], "USER:PASSWORD"),
            (["--max_upload", "0"], "--max_upload 0"),
            (["--pictures", "nowhere"], "nowhere"),
            (["--model", "nowhere"], "nowhere is no folder"),
        ],
    )
    def test_wrong_ones_are_named_before_a_model_is_loaded(self, wrong, said):
        pytest.importorskip("gradio")
        with pytest.raises(SystemExit, match=said):
            app.main(wrong)

    @pytest.mark.parametrize(
        "given, share, auth",
        [
            ([], False, None),
            (["--share"], True, None),
            (["--auth", "me:se:cret"], False, ("me", "se:cret")),
        ],
    )
    def test_what_gradio_is_told(self, given, share, auth):
        pytest.importorskip("gradio")
        told = {}

        class Blocks:
            def queue(self, **options):
                return self

            def launch(self, **options):
                told.update(options)

        app.launch(Blocks(), app.parse(given))
        assert (told["share"], told["auth"], told["server_name"]) == (share, auth, "127.0.0.1")
        assert told["max_file_size"] == 64 * 2**20 and told["enable_monitoring"] is False

    @pytest.mark.parametrize(
        "given, allowed",
        [
            ([], True),
            (["--host", "0.0.0.0"], False),
            (["--share"], False),
            (["--share", "--allow-addresses"], True),
            (["--no-allow-addresses"], False),
        ],
    )
    def test_addresses_are_fetched_for_this_machine_alone(self, given, allowed):
        assert app.fetches_addresses(app.parse(given)) is allowed

    def test_a_model_that_cannot_be_loaded_closes_the_page(self, monkeypatch):
        pytest.importorskip("gradio")
        done = []

        class Blocks:
            def close(self, **options):
                done.append("closed")

        def load(args):
            raise SystemExit("demo cannot be loaded")

        monkeypatch.setattr(app, "build", lambda *_: Blocks())
        monkeypatch.setattr(app, "launch", lambda *_, **__: done.append("opened"))
        monkeypatch.setattr(app, "load", load)
        desk = Desk(None, About("x"))
        with pytest.raises(SystemExit, match="cannot be loaded"):
            app.serve(desk, app.parse([]))
        assert done == ["opened", "closed"]
        with pytest.raises(ValueError, match="could not be loaded"):
            desk.model  # noqa: B018

    def test_without_gradio(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert app.main([]) == 1
        assert "pip install" in capsys.readouterr().err

    def test_an_endpoint_without_a_server(self, capsys):
        pytest.importorskip("gradio")
        pytest.importorskip("openai")
        assert app.main(["--endpoint", "http://127.0.0.1:9"]) == 1
        assert "is the server running?" in capsys.readouterr().err
