"""The steps of an illustrated article, each a generator of (article, note): what there is so far, and what was done.

    composer = Composer(model, tokenizer)
    for article, note in composer.write("Write about a harbour town."):
        ...
    for article, note in composer.illustrate(article, candidates="photos/"):
        print(note)

Leaving a generator early stops the model; the last article is whole and stays. Whatever the model answers, a step takes
what it can use, says in its note what it could not, and goes on.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from xcomposer.article import prompts
from xcomposer.article.article import Article, Settings, is_title
from xcomposer.article.pictures import Pictures, Source, search_of
from xcomposer.model.prompting_internlm_xcomposer2 import escape_control_tokens

WRITE, BASE = "write", "base"  # the adapter of every step but the edits, which run without one, as they were trained
STEP_TOKENS = 200  # of an answer that names places, a caption or a choice
EDIT_TOKENS = 500  # of prompt and answer together, as in the public demo
WHOLE = (
    ".",
    "!",
    "?",
    "。",
    "！",
    "？",
    "…",
    '"',
    "”",
    ")",
    "）",
)  # how a paragraph ends that is not to be gone on with
EDIT_LEAST = 256  # of the answer: a long paragraph must not leave it nothing


class Note(NamedTuple):
    """What a step has to say.

    step: "write", "continue", "places", "captions", "choose", or the name of an edit.
    text: for people.
    block: id of the block it is about.
    done, of: how far the step is; of 0: it cannot tell.
    answer: what the model said, where it could not be used; "" where all is well.
    """

    step: str
    text: str = ""
    block: str = ""
    done: int = 0
    of: int = 0
    answer: str = ""

    def __str__(self) -> str:
        progress = f" {self.done} of {self.of}" if self.of else ""
        return f"{self.step}{progress}: {self.text}" if self.text else f"{self.step}{progress}"


Steps = Iterator[tuple[Article, Note]]


class Composer:
    """The steps on one model, with one session's pictures.

    Args:
        model: has `stream_chat` and `chat` as `InternLMXComposer2ForCausalLM` has them.
        tokenizer: the checkpoint's; None: `model.tokenizer`.
        pictures: the session's store; None: a new one.
        group: most candidates in one question; more are chosen from in rounds.

    Raises:
        ValueError: a group that letters cannot name.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, pictures: Pictures | None = None, group: int = prompts.LETTERS
    ):
        if not 2 <= group <= prompts.LETTERS:
            raise ValueError(f"group must be 2 to {prompts.LETTERS}, got {group}")
        self.model, self.tokenizer, self.group = model, tokenizer, group
        self.pictures = Pictures() if pictures is None else pictures
        self.style = prompts.STYLES[getattr(getattr(model, "config", None), "article_style", "guided")]

    def write(
        self, instruction: str, pictures: Sequence[Source] = (), settings: Settings | None = None, seed: int = -1
    ) -> Steps:
        """A new article, streamed by token into its last paragraph.

        Args:
            instruction: what to write.
            pictures: material to write about: sources, or ids of the store.

        Raises:
            ValueError: an empty instruction, a picture that cannot be read, a prompt longer than the model's.
        """
        if not instruction.strip():
            raise ValueError("the instruction is empty: say what to write about")
        material = tuple(search_of(list(pictures), self.pictures)(""))
        start = Article(instruction=instruction, material=material, seed=seed, settings=settings or Settings())
        return self._written("write", start)

    def continue_(self, article: Article) -> Steps:
        """Go on where the article ends: its last paragraph if that is no whole sentence, else a new one."""
        if not article.instruction.strip():
            raise ValueError("the article has no instruction to go on by")
        return self._written("continue", article)

    def _written(self, step: str, start: Article) -> Steps:
        prompt = prompts.write(start.instruction, len(start.material), self.style)
        begun = "\n".join(paragraph.text for paragraph in start.paragraphs)
        glued = bool(begun) and not begun.endswith(WHOLE) and any(b.kind == "text" for b in start.blocks)
        begun += "\n" * (bool(begun) and not glued)
        article = start
        for said in self._ask(
            start, prompt._replace(begun=begun), start.material, WRITE, start.settings.max_new_tokens
        ):
            article = _with_lines(start, said, glued)
            yield article, Note(step, block=article.blocks[-1].id if article.blocks else "")
        count = len(article.blocks) - len(start.blocks)
        if article == start:
            yield article, Note(step, "the model wrote nothing", answer="(nothing)")
        else:
            yield article, Note(step, f"{count} paragraph{'s' * (count != 1)}", done=1, of=1)

    def places(self, article: Article, count: int | None = None) -> Steps:
        """Places for pictures, as the model puts them; places that are there already stay.

        Args:
            count: how many; None: as many as the model likes.

        Raises:
            ValueError: a count below 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        paragraphs = article.paragraphs
        prompt = prompts.places([p.text for p in paragraphs], count, len(article.material))
        answer = yield from self._wait(article, Note("places"), prompt, article.material, WRITE, STEP_TOKENS)
        found = prompts.places_of(answer, len(paragraphs))[:count]
        for number in found:
            after = paragraphs[number].block
            at = article.index(after) + 1 if after else 0
            if at == len(article.blocks) or article.blocks[at].kind != "picture":
                article, _ = article.with_place(after)
        if not found:
            yield article, Note("places", f"the model named no paragraph: {answer!r}", done=1, of=1, answer=answer)
        elif count is not None and len(found) < count:
            text = f"the model named {len(found)} of {count} places: {answer!r}"
            yield article, Note("places", text, done=1, of=1, answer=answer)
        else:
            yield article, Note("places", f"{len(found)} found", done=1, of=1)

    def captions(self, article: Article, blocks: Sequence[str] | None = None) -> Steps:
        """Captions of places, in the order of the article, each knowing those before it.

        Args:
            blocks: ids; None: every place without a caption.

        Raises:
            ValueError: an id that is no place of the article.
        """
        names = [b.id for b in article.places if not b.caption] if blocks is None else _places(article, blocks)
        for done, name in enumerate(names):
            number = max(0, article.paragraph_before(name))
            past = {
                max(0, article.paragraph_before(b.id)): b.caption
                for b in article.places
                if b.caption and article.index(b.id) < article.index(name)
            }
            texts = [p.text for p in article.paragraphs]
            note = Note("captions", block=name, done=done, of=len(names))
            answer = yield from self._wait(
                article, note, prompts.caption(texts, number, past, self.style), (), WRITE, STEP_TOKENS
            )
            caption = prompts.caption_of(answer, self.style)
            if caption:
                article = article.changed(name, caption=caption)
                yield article, Note("captions", caption, name, done + 1, len(names))
            else:
                text = f"the model gave no caption: {answer!r}"
                yield article, Note("captions", text, name, done + 1, len(names), answer or "(nothing)")

    def caption(self, article: Article, block: str) -> Steps:
        """The caption of one place, anew. Raises: as `captions`."""
        return self.captions(article, [block])

    def choose(self, article: Article, candidates: Any, blocks: Sequence[str] | None = None, ranks: int = 1) -> Steps:
        """A picture for each place, chosen by the model; no picture twice in an article.

        More candidates than letters meet in groups, then the winners of the groups. Each picture is embedded once as
        long as `model.reuse` has room for it.

        Args:
            candidates: sources or ids in a list, a folder, or a function from a caption to sources.
            blocks: ids; None: every place without a picture.
            ranks: so many of the best are found, each by asking again without the better ones.

        Raises:
            ValueError, FileNotFoundError: as `search_of`; or an id that is no place of the article.
        """
        names = [b.id for b in article.places if not b.picture] if blocks is None else _places(article, blocks)
        search = search_of(candidates, self.pictures)
        for done, name in enumerate(names):
            place = article.block(name)
            used = {b.picture for b in article.places if b.id != name}
            free = [picture for picture in search(place.caption) if picture not in used]
            note = Note("choose", block=name, done=done, of=len(names))
            best: list[str] = []
            unused: list[str] = []
            for _ in range(min(ranks, len(free))):
                rest = [picture for picture in free if picture not in best]
                winner = yield from self._winner(article, name, rest, note, unused)
                if winner is None:
                    break
                best.append(winner)
            ordered = (*best, *(picture for picture in free if picture not in best))
            article = article.changed(name, picture=best[0] if best else place.picture, candidates=ordered)
            if best:
                yield article, Note("choose", "chosen", name, done + 1, len(names), "; ".join(unused))
            else:
                text = f"the model named no picture: {'; '.join(unused)}" if unused else "no candidates are left"
                yield article, Note("choose", text, name, done + 1, len(names), "; ".join(unused) or "(nothing)")

    def _winner(
        self, article: Article, place: str, candidates: list[str], note: Note, unused: list[str]
    ) -> Generator[tuple[Article, Note], None, str | None]:
        """The best of the candidates; answers that named none are added to `unused`."""
        last = article.paragraph_before(place)
        texts = [p.text for p in article.paragraphs[: last + 1]]
        standing = {
            max(0, article.paragraph_before(b.id)): b.picture
            for b in article.places
            if b.picture and article.index(b.id) < article.index(place)
        }
        group = self.group
        while len(candidates) > 1:
            winners = []
            groups = [candidates[at : at + group] for at in range(0, len(candidates), group)]
            for some in groups:
                if len(some) == 1:
                    winners += some
                    continue
                prompt = prompts.choose(texts, standing, len(some))
                shown = [*standing.values(), *some]
                try:
                    answer = yield from self._wait(
                        article, note, prompt, shown, WRITE, STEP_TOKENS, until=prompts.LETTER
                    )
                except ValueError:  # longer than the model's prompts can be: found before any compute
                    if group <= 2:
                        raise
                    group = max(2, len(some) // 2)
                    winners = candidates  # again, in smaller groups
                    break
                at = prompts.letter_of(answer, len(some))
                if at is None:
                    unused.append(answer or "(nothing)")
                else:
                    winners.append(some[at])
            candidates = winners
        return candidates[0] if candidates else None

    def illustrate(self, article: Article, candidates: Any, count: int | None = None) -> Steps:
        """Places, captions and pictures for all of them. Arguments and errors: as the three steps."""
        search = search_of(candidates, self.pictures)  # wrong ones are found before the first step
        steps = (
            lambda article: self.places(article, count),
            self.captions,
            lambda article: self.choose(article, search),
        )
        for step in steps:
            for so_far, note in step(article):
                article = so_far
                yield article, note

    def edit(self, article: Article, block: str, how: str, material: str = "") -> Steps:
        """A paragraph rewritten, expanded or shortened in its place, or a new one inserted behind it.

        The articles on the way have the words so far; who discards the edit keeps the article from before.

        Args:
            how: "expand", "rewrite", "shorten" or "insert".
            material: what to work in; what an inserted paragraph should say.

        Raises:
            ValueError: an unknown edit, no such block, or a block that is no paragraph.
        """
        if article.block(block).kind != "text":
            raise ValueError(f"block {block!r} is a picture's place: edits are of paragraphs")
        before = article.block(block).text
        behind = [b for b in article.blocks[article.index(block) + 1 :] if b.kind == "text"]
        prompt = prompts.edit(how, before, material, behind[0].text if behind else "")
        return self._edited(article, block, how, prompt)

    def _edited(self, article: Article, block: str, how: str, prompt: prompts.Prompt) -> Steps:
        base, target = article.with_text("", block) if how == "insert" else (article, block)
        edited, text = article, ""
        limit = max(EDIT_LEAST, EDIT_TOKENS - self._tokens(prompt.query))
        for said in self._ask(article, prompt, (), BASE, limit):
            text = " ".join(prompts.without_marks(said).split())
            if text:
                edited = base.changed(target, text=text)
                yield edited, Note(how, block=target)
        if text:
            yield edited, Note(how, "done", target, 1, 1)
        else:
            yield article, Note(how, "the model wrote nothing: the paragraph stays", block, 1, 1, "(nothing)")

    def _tokens(self, text: str) -> int:
        tokenizer = self.tokenizer or getattr(self.model, "tokenizer", None)
        return len(tokenizer(text).input_ids) if tokenizer else 0

    def _wait(
        self,
        article: Article,
        note: Note,
        prompt: prompts.Prompt,
        pictures: Sequence[str],
        mode: str,
        limit: int,
        until: re.Pattern[str] | None = None,
    ) -> Generator[tuple[Article, Note], None, str]:
        """Ask, and return the whole answer; yields at each token, so that it can be stopped there.

        until: the answer ends where this is found. A model may think before it names a letter; the rest is not read.
        """
        answer = ""
        yield article, note
        with closing(self._ask(article, prompt, pictures, mode, limit)) as answers:
            for said in answers:
                answer = said
                if until and until.search(answer):
                    break
                yield article, note
        return prompts.without_marks(answer)

    def _ask(
        self, article: Article, prompt: prompts.Prompt, pictures: Iterable[str], mode: str, limit: int
    ) -> Generator[str, None, None]:
        """The model's answer as it grows."""
        settings = article.settings
        asked = dict(
            tokenizer=self.tokenizer,
            query=prompt.query,
            image=[self.pictures.opened(name) for name in pictures] or None,
            hd_num=settings.hd_num,
            infer_mode=mode,
            use_meta=bool(prompt.system),
            meta_instruction=prompt.system,
            escape_control_tokens=True,  # what people typed opens and ends no turn
            answer_start=escape_control_tokens(prompt.begun),
            max_new_tokens=limit,
            seed=article.seed,
            **settings.generation,
            **self._of_style(),
        )
        if settings.num_beams > 1:  # beams may change what is written already
            answers = iter([self.model.chat(**asked)])
        else:
            answers = self.model.stream_chat(**asked)
        for said, _ in answers:
            yield said.split(self.style.stop)[0] if self.style.stop else said

    def _of_style(self) -> dict[str, Any]:
        """Settings that the kind's style has besides."""
        if self.style == prompts.GUIDED:
            return {}
        tokenizer = self.tokenizer or self.model.tokenizer
        stop = tokenizer.convert_tokens_to_ids(self.style.stop)
        return {"bos_once": self.style.bos_once, "stop_token_ids": None if stop == tokenizer.unk_token_id else [stop]}


def _places(article: Article, blocks: Sequence[str]) -> list[str]:
    """The ids, in the order of the article."""
    wrong = [name for name in blocks if article.block(name).kind != "picture"]
    if wrong:
        raise ValueError(f"block {wrong[0]!r} is a paragraph, not a picture's place")
    return sorted(blocks, key=article.index)


def _with_lines(start: Article, said: str, glued: bool) -> Article:
    """`start` and what the model has written after it. glued: its first line goes on with the last paragraph."""
    lines = prompts.paragraphs_of(said)
    article = start
    texts = [b for b in start.blocks if b.kind == "text"]
    if glued and lines and texts:
        article = article.changed(texts[-1].id, text=texts[-1].text + said.split("\n")[0].rstrip())
        lines = lines[1:] if said.split("\n")[0].strip() else lines
    elif lines and not start.paragraphs and is_title(lines[0], lines[1:]):
        article = article.titled(lines[0].lstrip("# "))
        lines = lines[1:]
    for line in lines:
        article, _ = article.with_text(line)
    return article


def finish(steps: Steps, tell: Callable[[Note], Any] | None = None) -> Article:
    """Run a step to its end. tell: gets every note that has a text."""
    article = Article()
    for so_far, note in steps:
        article = so_far
        if tell and note.text:
            tell(note)
    return article
