"""Plugin `code_tasks`: data sources that judge responses by running programs or by comparing numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weighted_mtp_core.api import Component, DataSource, hookimpl

from weighted_mtp_code_tasks.code_contests import CodeContestsOptions, build_code_contests
from weighted_mtp_code_tasks.gsm8k import Gsm8kOptions, build_gsm8k
from weighted_mtp_code_tasks.humaneval import HumanEvalOptions, build_humaneval
from weighted_mtp_code_tasks.jsonl import JudgedJsonlOptions, build_jsonl
from weighted_mtp_code_tasks.mbpp import MbppOptions, build_mbpp
from weighted_mtp_code_tasks.micro_chain import MicroChainOptions, build_micro_chain
from weighted_mtp_code_tasks.micro_code import MicroCodeOptions, build_micro_code
from weighted_mtp_code_tasks.problems import ProblemsOptions, build_problems
from weighted_mtp_code_tasks.sandbox.examine import examine_sandbox


@hookimpl
def wmtp_data_sources() -> Iterable[Component[Any, DataSource]]:
    """Offer the data sources of this plugin."""
    yield Component(
        name="code_contests",
        summary="Contest programs in Python 3 that read stdin; correct and incorrect, labelled by running.",
        options=CodeContestsOptions,
        build=build_code_contests,
        examine=examine_sandbox,
    )
    yield Component(
        name="gsm8k",
        summary="School mathematics in words; solutions and model samples, labelled by their final number.",
        options=Gsm8kOptions,
        build=build_gsm8k,
    )
    yield Component(
        name="humaneval",
        summary="HumanEval's 164 problems; solutions and broken variants, labelled by running them.",
        options=HumanEvalOptions,
        build=build_humaneval,
        examine=examine_sandbox,
    )
    yield Component(
        name="jsonl",
        summary="Your own examples, as core.jsonl reads them; tests in rows judge the policy's completions.",
        options=JudgedJsonlOptions,
        build=build_jsonl,
        examine=examine_sandbox,
    )
    yield Component(
        name="mbpp",
        summary="MBPP's 964 problems; solutions, broken variants, model samples, labelled by running them.",
        options=MbppOptions,
        build=build_mbpp,
        examine=examine_sandbox,
    )
    yield Component(
        name="micro_code",
        summary="Small Python functions made by a grammar; correct and broken, labelled by running them.",
        options=MicroCodeOptions,
        build=build_micro_code,
        examine=examine_sandbox,
    )
    yield Component(
        name="micro_chain",
        summary="Small functions with slips at known places; correct and incorrect, labelled by running.",
        options=MicroChainOptions,
        build=build_micro_chain,
        examine=examine_sandbox,
    )
    yield Component(
        name="problems",
        summary="Problems of a file in HumanEval's format, to judge completions; nothing to train on.",
        options=ProblemsOptions,
        build=build_problems,
        examine=examine_sandbox,
    )
