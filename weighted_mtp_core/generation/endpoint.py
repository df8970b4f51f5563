"""Samples texts from a server with OpenAI's completions API, such as vLLM."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import requests
from attrs import field, frozen
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.generation.samplers import SampledText
from weighted_mtp_core.recipe.schema import EvaluateTable

API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key of the server, if the server needs a key."""

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_CONNECT_S = 10.0
_PER_WORKER = 16  # requests per call and thread, so that threads are idle only briefly at the end of a call


@frozen(kw_only=True, eq=False)
class EndpointSampler:
    """Samples from a server; each text is a request of its own, with a seed of its own.

    A request is repeated if the server is busy, reports an internal error or does not answer. The pauses
    between the attempts grow, unless the server requests a pause.

    Attributes:
        model: The name of the model on the server.
        url: The address of the API, which ends in `/v1` for most servers.
        table: Number, temperature and length of the samples.
        seed: Seed from which the seeds of the texts are derived.
        in_flight: Largest number of simultaneous requests.
        retries: Maximum number of times that a request is repeated.
        timeout: Seconds to wait for an answer.
    """

    model: str
    url: str = field()
    table: EvaluateTable
    seed: int
    in_flight: int
    retries: int
    timeout: float
    _session: requests.Session = field(init=False)

    @url.validator
    def _check_url(self, _: object, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise WmtpError(
                f"`{url}` is not the address of a server", hint="for example http://127.0.0.1:8000/v1"
            )

    @_session.default
    def _open_session(self) -> requests.Session:
        session = requests.Session()
        if key := os.environ.get(API_KEY):
            session.auth = _Bearer(key)
        retry = Retry(
            total=self.retries,
            status_forcelist=_TRANSIENT,
            allowed_methods=["POST"],
            backoff_factor=0.5,
            backoff_jitter=0.25,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(pool_maxsize=self.in_flight, max_retries=retry)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session

    @property
    def at_once(self) -> int:
        """The recommended number of texts per call of `sample`: 16 for each request in flight."""
        return _PER_WORKER * self.in_flight

    def sample(
        self, prompts: Sequence[tuple[str, str]], *, on_done: Callable[[int], None]
    ) -> list[list[SampledText]]:
        """Return the samples of each prompt; see `Sampler.sample`."""
        count = self.table.samples
        asked = [(name, text, number) for name, text in prompts for number in range(count)]
        found: list[SampledText] = []
        with ThreadPool(self.in_flight) as pool:
            for sampled in pool.imap(self._sample_one, asked):
                found.append(sampled)
                on_done(len(found))
        return [found[first : first + count] for first in range(0, len(found), count)]

    def _sample_one(self, asked: tuple[str, str, int]) -> SampledText:
        name, prompt, number = asked
        digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1  # servers accept seeds of at most 31 bits
        answer = self._post(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": self.table.max_new_tokens,
                "temperature": self.table.temperature,
                "top_p": 1,
                "seed": seed,
                "logprobs": 1,
            }
        )
        try:
            choice = answer["choices"][0]
            text, finished = choice["text"], choice["finish_reason"] == "stop"
            logprobs = choice["logprobs"]
            tokens, numbers = logprobs["tokens"], [float(each) for each in logprobs["token_logprobs"]]
            pairs = list(zip(tokens, numbers, strict=True))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WmtpError(
                f"`{self.url}` answers without log-probabilities of the tokens: {error!r}",
                hint="use a server whose completions API takes `logprobs`, such as vLLM",
            ) from error
        return SampledText(
            text=text,
            finished=finished,
            tokens=tuple(token for token, _ in pairs),
            logprobs=tuple(number for _, number in pairs),
            seed=seed,
        )

    def _post(self, body: Mapping[str, Any]) -> Any:
        again = "the same command continues where it stopped"
        try:
            answer = self._session.post(
                f"{self.url.rstrip('/')}/completions",
                json=body,
                timeout=(_CONNECT_S, self.timeout),
                allow_redirects=False,
            )
            content = answer.json() if answer.ok else None
        except requests.RequestException as error:
            raise RunFailedError(f"`{self.url}` does not answer: {_reason(error)}", hint=again) from error
        if answer.status_code in _TRANSIENT:
            raise RunFailedError(
                f"`{self.url}` still answers {_fault(answer)} after {self.retries} retries", hint=again
            )
        if answer.status_code != requests.codes.ok:
            hint = "set its key: OPENAI_API_KEY" if answer.status_code in (401, 403) else None
            raise WmtpError(f"`{self.url}` refuses the request: {_fault(answer)}", hint=hint)
        return content


@frozen
class _Bearer(requests.auth.AuthBase):
    """Adds an API key to requests; a login in `.netrc` replaces a header of the session, but not this key."""

    key: str = field(repr=False)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def _reason(error: requests.RequestException) -> str:
    """Return why a request failed, without the address of the server, which may contain a password."""
    cause: Any = error.args[0] if error.args else error
    cause = getattr(cause, "reason", None) or cause
    return str(cause).rpartition("object at ")[2].partition(": ")[2] or str(cause) or type(error).__name__


def _fault(answer: requests.Response) -> str:
    """Return the status and the message of an error response; in OpenAI's format, the message is nested."""
    try:
        content = answer.json()
        message = content.get("error", content)
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = answer.text
    return f"{answer.status_code} {answer.reason}: {str(message)[:300]}"
