"""Reading through a client: tokens laid beside characters, and what is missing is None; which reader a name means."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.config import LLMConfig
from exegete.demo import assets
from exegete.errors import ConfigError, InputError, LLMError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient
from exegete.llm.open import client_from_spec
from exegete.llm.reading import reader_from_spec, subject_reader
from exegete.llm.reading_local import LocalReader
from exegete.llm.reading_server import ServerReader, summed, token_ends
from exegete.llm.scripted import ScriptedClient
from exegete.subjects import Subject, load_subject, randomised
from exegete.testing import BOS, toy_llama
from exegete.types import LLMReply, LLMRequest, TokenLogprob

READS = Capabilities(completions=True, prompt_logprobs=True)


def tokens(*given: str | tuple[str, float | None]) -> tuple[TokenLogprob, ...]:
    pairs = [part if isinstance(part, tuple) else (part, -1.0) for part in given]
    return tuple(TokenLogprob(token=token, logprob=nats) for token, nats in pairs)


class Answering(LLMClient):
    """A client that is no simulation, as far as it says itself."""

    def __init__(self, answer: Callable[[str], LLMReply], can: Capabilities = READS) -> None:
        self.answer, self.can = answer, can
        self.asked: list[LLMRequest] = []
        self.closed = 0

    @property
    def name(self) -> str:
        return "http://there#model"

    async def reply(self, request: LLMRequest) -> LLMReply:
        self.asked.append(request)
        return self.answer(str(request.prompt))

    async def check(self) -> None:
        pass

    async def capabilities(self) -> Capabilities:
        return self.can

    async def close(self) -> None:
        self.closed += 1


def words(prompt: str) -> LLMReply:
    """Tokens of four characters, each of −(its place) nats; the first has none."""
    parts = [prompt[i : i + 4] for i in range(0, len(prompt), 4)]
    found = tokens(*((part, -float(i) if i else None) for i, part in enumerate(parts)))
    return LLMReply(text="", finish="length", prompt_logprobs=found)


def test_every_token_that_holds_a_character_of_the_continuation_counts() -> None:
    client = Answering(words)
    reader = ServerReader(client)
    pairs = [("abcdefgh", "ijkl"), ("abcdefg", "hijkl"), ("abcdefgh", "i"), ("abcdefgh", "ijkl"), ("abc", "")]
    assert asyncio.run(reader.logprobs(pairs)) == [-2.0, -3.0, -2.0, -2.0, 0.0]
    assert [request.prompt for request in client.asked] == ["abcdefghijkl", "abcdefghi"]  # one text, once
    asked = client.asked[0]
    assert (asked.prompt_logprobs, asked.max_tokens, asked.temperature) == (True, 1, 0.0)
    asyncio.run(reader.close())
    assert client.closed == 1
    assert (reader.name, reader.natural) == ("http://there#model", True)


def test_what_was_not_read_is_none() -> None:
    answers = {
        "failed": LLMReply(text=None, finish="error", error="busy"),
        "silent": LLMReply(text="", finish="stop"),
        "other": LLMReply(text="", finish="stop", prompt_logprobs=tokens("something", " else")),
        "gap": LLMReply(text="", finish="stop", prompt_logprobs=tokens("g", ("ap", None))),
        "nan": LLMReply(text="", finish="stop", prompt_logprobs=tokens("n", ("an", math.nan))),
    }
    reader = ServerReader(Answering(answers.__getitem__))
    assert asyncio.run(reader.logprobs([(text[:1], text[1:]) for text in answers])) == [None] * len(answers)
    assert asyncio.run(ServerReader(Answering(words)).logprobs([("", "abcdef")])) == [None]


def test_a_server_that_cannot_be_used_at_all_raises() -> None:
    reader = ServerReader(ScriptedClient([LLMError("the key was refused")]))
    with pytest.raises(LLMError, match="refused"):
        asyncio.run(reader.logprobs([("a", "b")]))
    assert not reader.natural


@given(parts=st.lists(st.text("ab é\n日", min_size=1, max_size=3), max_size=8), border=st.integers(0, 20))
def test_tokens_that_spell_a_text_end_where_they_do(parts: list[str], border: int) -> None:
    stops = [len("".join(parts[: i + 1])) for i in range(len(parts))]
    assert token_ends(parts, "".join(parts), border) == stops


@pytest.mark.parametrize(
    ("given", "text", "border", "ends"),
    [
        (["<s>", "ab", " c"], "ab c", 2, [0, 2, 4]),  # a BOS that is not in the text
        (["a", "\\xe6\\x97", "\\xa5", " b"], "a日 b", 2, [1, 2, 2, 4]),  # parts of a character
        (["a", "\ufffd", "\ufffd", "b"], "a日b", 1, [1, 2, 2, 3]),
        (["a", "\ufffd", "\ufffd"], "a日", 2, [1, 2, 2]),  # … at the very end
        (["\ufffd", "\ufffd", "b"], "日本b", 1, None),  # the border lies among them
        (["\ufffd", "b"], "日本b", 1, [2, 3]),  # one token holds both, so it counts
        (["\ufffd", "\ufffd", "b"], "日本b", 2, [2, 2, 3]),
        (["a", "", "", "日", "b"], "a日b", 1, [1, 2, 2, 2, 3]),  # a character given to the last of its tokens
        (["", "ab", ""], "ab", 1, [2, 2, 2]),
        (["ab"], "abc", 1, None),
        (["ab", "d"], "abc", 3, [2, 3]),  # one odd token may be anything
        (["ab", "zz", "c"], "ab" + "y" * 20 + "c", 1, None),  # … but not so much
        ([], "", 0, []),
        ([], "a", 0, None),
    ],
)
def test_tokens_that_are_no_text_by_themselves(
    given: Sequence[str], text: str, border: int, ends: list[int] | None
) -> None:
    assert token_ends(given, text, border) == ends


def test_only_counted_tokens_need_a_log_probability() -> None:
    assert summed(tokens(("a", None), ("b", -2.0), ("c", -0.5)), "abc", 1) == -2.5
    assert summed(tokens(("a", -9.0), ("bc", None)), "abc", 0) is None
    assert summed(tokens("a", "b"), "ab", 2) == 0.0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("toy"))), device="cpu")


def test_through_a_client_of_this_process_the_numbers_are_those_read_directly(toy: Subject) -> None:
    client = client_from_spec(f"hf/{toy.name}", LLMConfig(reply_cache=False))
    assert client is not None
    served = reader_from_spec(f"hf/{toy.name}", LLMConfig(), llm=client)
    assert isinstance(served, ServerReader)
    pairs = [("The quick brown", " fox jumps"), ("def a", "dd(first)"), ("naïve", " 東京 café")]
    found = asyncio.run(served.logprobs([(BOS + beginning, text) for beginning, text in pairs]))
    assert found == [pytest.approx(nats, abs=1e-4) for nats in asyncio.run(subject_reader(toy).logprobs(pairs))]
    client.end()


def test_a_subject_reads_and_the_demo_model_knows_no_language(toy: Subject) -> None:
    reader = reader_from_spec("subject", LLMConfig(), subject=lambda: toy)
    assert isinstance(reader, LocalReader)
    assert (reader.name, reader.natural) == ("subject", True)
    demo = load_subject(str(assets() / "model"), device="cpu")
    assert not subject_reader(demo).natural
    assert not subject_reader(randomised(toy, 0)).natural
    assert not reader_from_spec(f"hf/{assets() / 'model'}", LLMConfig()).natural


def test_a_copy_of_the_demo_model_knows_no_more(tmp_path: Path) -> None:
    for file in (assets() / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    reader = reader_from_spec(f"hf/{tmp_path}", LLMConfig())
    assert not reader.natural
    assert reader.name == f"hf/{tmp_path}"


def test_auto_is_the_llm_where_it_gives_log_probabilities_of_prompts(toy: Subject) -> None:
    able, unable = Answering(words), Answering(words, Capabilities())

    def chosen(llm: LLMClient | None, subject: Any = lambda: toy) -> Any:
        return reader_from_spec("auto", LLMConfig(), subject=subject, llm=llm)

    assert chosen(able, None).name == able.name
    assert able.closed == 1
    for other in (unable, ScriptedClient([], capabilities=READS), None):
        assert chosen(other).name == "subject"
    with pytest.raises(ConfigError, match="reads with the subject"):
        chosen(None, None)
    with pytest.raises(InputError, match="gives no log probabilities of a prompt's tokens"):
        reader_from_spec(unable.name, LLMConfig(), llm=unable)


@pytest.mark.parametrize("spec", ["none", "hf/", "elephant"])
def test_a_name_that_means_no_reader_is_refused(spec: str) -> None:
    with pytest.raises(InputError) as error:
        reader_from_spec(spec, LLMConfig())
    assert "\n" not in str(error.value)
