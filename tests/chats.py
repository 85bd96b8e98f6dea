"""What tests ask of the tiny model, and tokenizers and streamers that note what they are given."""

from conftest import GOLDEN, MARK

PICTURES = [str(GOLDEN / f"images/small_{size}.png") for size in ("150x100", "56x56", "90x210", "300x60")]
QUERY = "Describe this image in detail"
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}


class Spoken:
    """A tokenizer that notes what it is asked, and may be given the answers to say instead of the model's."""

    def __init__(self, tokenizer, answers=()):
        self.tokenizer, self.answers, self.heard, self.ids = tokenizer, list(answers), [], []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, *args, **kwargs):
        self.heard.append(text)
        return self.tokenizer(text, *args, **kwargs)

    def decode(self, ids, *args, **kwargs):
        self.ids.append([int(token) for token in ids])
        return self.answers.pop(0) if self.answers else self.tokenizer.decode(ids, *args, **kwargs)

    @property
    def prompt(self):
        return MARK.join(self.heard)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self, fail_at=None):
        self.tokens, self.ended, self.fail_at = [], 0, fail_at

    def put(self, value):
        self.tokens += value.flatten().tolist()
        if self.fail_at is not None and len(self.tokens) >= self.fail_at:
            raise KeyboardInterrupt("the listener went away")

    def end(self):
        self.ended += 1


def told(model, **kwargs):
    """The answer about a picture."""
    return model.chat(None, f"{MARK}What is it?", PICTURES[:1], **{**GREEDY, **kwargs})[0]


def tokens_of(model, query=QUERY, image=PICTURES[0], **kwargs):
    """Tokens that `chat` generates, greedily unless told otherwise."""
    spoken = Spoken(model.tokenizer)
    kwargs = {"do_sample": False, "max_new_tokens": 12, **kwargs}
    model.chat(spoken, query, image, **kwargs)
    return spoken.ids[-1]
