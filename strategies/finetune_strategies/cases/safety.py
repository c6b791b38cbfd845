"""Templates, pickles, links and configs by a stranger."""

from typing import Annotated, Literal, get_args

from hypothesis import strategies as st
from pydantic import Field

from finetune_strategies.cases.learned import ONE_ROW
from finetune_strategies.cases.rows import Rows, one_of
from finetune_strategies.recipes import Recipe

INSIDES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ ('%s' | attr('format')).__globals__ }}",
    "{{ raise_exception.__globals__ }}",
)

_COSTLY = (
    "{{ 'a' * 9000000 }}",
    "{% for n in range(200000) %}a{% endfor %}",
    "{{ 2 ** 9999999 and '' }}",
    "{{ '%9000000d' % 1 }}",
)


class Hostile(Recipe):
    """A chat template that a stranger wrote."""

    attack: Annotated[str, Field(pattern=one_of([*INSIDES, *_COSTLY]))]


SAFETY_TEMPLATE = st.builds(Hostile, attack=st.sampled_from([*INSIDES, *_COSTLY]))
PickleName = Literal["", "adapter_model.bin", "rng_state.pth", "optimizer.pt", "training_args.bin"]
"""A finding in a file comes from a stranger: a name that is a path of theirs is refused when it is read."""


class Pickled(Rows):
    """Rows, and the file in whose place, or beside which, a pickle lies."""

    name: PickleName


SAFETY_PICKLE = st.builds(Pickled, rows=ONE_ROW, name=st.sampled_from(get_args(PickleName)))


class Elsewhere(Recipe):
    """What an index names, or how a file leads elsewhere."""

    kind: Annotated[str, Field(pattern="^(above|absolute|link)$")]


SAFETY_FILES = st.builds(Elsewhere, kind=st.sampled_from(["above", "absolute", "link"]))


class Code(Recipe):
    """Which class a model's files name in a file of its own, and how they name that."""

    name: Literal["AutoModelForCausalLM", "AutoConfig", "AutoTokenizer"]
    key: Literal["auto_map", "model_file", "of the tokenizer"] = "auto_map"


SAFETY_CODE = st.sampled_from(
    [
        Code(name="AutoModelForCausalLM"),
        Code(name="AutoModelForCausalLM", key="model_file"),
        Code(name="AutoTokenizer", key="of the tokenizer"),
        Code(name="AutoConfig"),
        Code(name="AutoTokenizer"),
    ]
)


class Configured(Recipe):
    """What a configuration file says of an object to make."""

    tag: Literal["apply:os.mkdir", "apply:subprocess.getoutput"]


SAFETY_CONFIG = st.builds(Configured, tag=st.sampled_from(["apply:os.mkdir", "apply:subprocess.getoutput"]))
LinkName = Literal["checkpoints", "adapter", "events.jsonl", "plan.yaml"]


class Linked(Rows):
    """Which part of a run is a link."""

    name: LinkName


SAFETY_LINKS = st.builds(Linked, rows=ONE_ROW, name=st.sampled_from(get_args(LinkName)))
