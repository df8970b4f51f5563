"""Mutants for the checks that components of every kind must pass; each is offered as a weighting."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
from attrs import frozen

from wmtp_mutants.weightings import SoundStateless


class TwoLineSummary(SoundStateless):
    caught_by: ClassVar = {"test_summary_is_one_line"}
    summary = "One line\nand another."


@attrs.define(kw_only=True)
class MutableOptions:
    beta: float = 1.0


class OptionsThatChange(SoundStateless):
    caught_by: ClassVar = {"test_options_are_frozen"}
    options = MutableOptions


@frozen
class PositionalOptions:
    beta: float = 1.0


class OptionsByPosition(SoundStateless):
    caught_by: ClassVar = {"test_options_are_keyword_only"}
    options = PositionalOptions


@frozen(kw_only=True)
class UntypedOptions:
    beta: Any = 1.0


class OptionsOfAnyType(SoundStateless):
    caught_by: ClassVar = {"test_options_are_typed"}
    options = UntypedOptions


@frozen(kw_only=True)
class DriftingOptions:
    beta: float = attrs.field(default=1.0, converter=lambda beta: beta / 2)


class OptionsThatDrift(SoundStateless):
    caught_by: ClassVar = {"test_options_survive_a_resolved_recipe"}
    options = DriftingOptions


class OfNoKind:
    caught_by: ClassVar = {"test_builds_its_kind"}
    needs = SoundStateless.needs

    def __init__(self, options: Any, context: Any) -> None:
        self._inner = SoundStateless(options, context)
        self.weigh = self._inner.weigh
        self.state_dict = self._inner.state_dict
        self.load_state_dict = self._inner.load_state_dict


class SeedsEverybody(SoundStateless):
    caught_by: ClassVar = {"test_building_leaves_global_random_numbers_alone"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.torch.manual_seed(context.seed)


class BuiltOnce(SoundStateless):
    caught_by: ClassVar = {"test_builds_a_new_object_each_time"}
    objects: ClassVar[list[Any]] = []

    @classmethod
    def build(cls, options: Any, context: Any) -> BuiltOnce:
        if not cls.objects:
            cls.objects.append(cls(options, context))
        return cls.objects[0]


class TakesAnyState(SoundStateless):
    caught_by: ClassVar = {"test_refuses_state_that_it_does_not_keep"}

    def load_state_dict(self, state: Any) -> None:
        pass
