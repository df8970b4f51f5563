"""A policy that several processes load in shards is the policy that one process loads.

Shape letters: B rows, T positions, V vocabulary.
"""

import multiprocessing
from datetime import timedelta
from functools import partial
from operator import itemgetter
from traceback import format_exception

import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import write_export
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.adapters import merge_adapters
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.trunk import frozen_trunk
from weighted_mtp_core.recipe.schema import HeadsTable, MicroTable, ModelTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.fsdp import callable_
from weighted_mtp_core.runtime.sharding import local, mesh_of

V, K = 301, 3  # V is odd, so shards of the unembedding differ in size
MICRO = ModelTable(micro=MicroTable(vocab_size=300, hidden_size=16, layers=2, attention_heads=2), n_future=K)
LLAMA = LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=40, num_attention_heads=2, num_hidden_layers=3
)
GPT2 = GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1)
MODELS = {
    "untied": (LlamaForCausalLM, LLAMA, {"heads": HeadsTable(kind="parallel")}),
    "tied": (GPT2LMHeadModel, GPT2, {"heads": HeadsTable(kind="parallel")}),
    "medusa": (LlamaForCausalLM, LLAMA, {"heads": HeadsTable(kind="medusa")}),
    "sequential": (LlamaForCausalLM, LLAMA, {"heads": HeadsTable(kind="sequential")}),
    "adapters": (LlamaForCausalLM, LLAMA, {"train": "adapters", "base_dtype": "bfloat16"}),
}
PROMPTS = [[5, 6, 7], [8, 9]]


def load(path, storage, **processes):
    table = path if isinstance(path, ModelTable) else ModelTable(base=str(path), n_future=K)
    texts = ("def f(xs):\n    return sorted(xs)\n",)
    return load_policy(table, storage=storage, texts=lambda: texts, seed=1, **processes)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def tokenizer(storage):
    return load(MICRO, storage).tokenizer


@pytest.fixture
def directory(tokenizer, tmp_path):
    """Return a function that writes a model as a transformers directory."""

    def write(name):
        kind, config, _ = MODELS[name]
        torch.manual_seed(7)
        path = tmp_path / "base"
        kind(config).save_pretrained(path, max_shard_size="20KB")
        tokenizer.save_pretrained(path)
        return path

    return write


def as_one_of(work, rank, size, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    distributed = Distributed(rank=rank, size=size, control_group=dist.new_group(backend="gloo"))
    try:
        results.put((rank, work(distributed), None))
    except Exception as error:  # noqa: BLE001 - the test shows it
        results.put((rank, None, "".join(format_exception(error))))
    finally:
        distributed.shutdown()


def together(size, store, work):
    """Run `work` in several processes; return the results in the order of ranks."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=as_one_of, args=(work, rank, size, store, results)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=240) for _ in processes), key=itemgetter(0))
    for process in processes:
        process.join(60)
    assert [error for _, _, error in found if error is not None] == []
    return [result for _, result, _ in found]


def measured(table, storage, best, distributed=SINGLE_PROCESS):
    """Load and save a policy; return what it computes, and the bytes of parameters here and in all."""
    mesh = None if distributed.is_single_process else mesh_of(distributed, torch.device("cpu"))
    policy = load(table, storage, distributed=distributed, mesh=mesh).policy.eval()
    held = {
        name: (local(each).nbytes, each.nbytes)
        for name, each in policy.named_parameters()
        if "lora" not in name  # whole in each process, like all small matrices that are added to layers
    }
    trunk = frozen_trunk(callable_(policy))
    ids_BT = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(ids_BT)
        logits = [policy.logits(k, hidden_BTH, ids_BT=ids_BT) for k in range(1, K + 1)]
    zero_BT = torch.zeros_like(ids_BT)
    batch = Batch(
        ids_BT=ids_BT, document_BT=zero_BT, response_BT=zero_BT == 0, reward_BT=zero_BT, group_BT=zero_BT
    )
    copied_BTH = trunk(batch)
    decoded = [
        generate(policy, PROMPTS, max_new_tokens=6, eos_id=1, decoding=decoding).tokens
        for decoding in ("plain", "self_speculative")
    ]
    save_model(policy, best, distributed=distributed)
    return ([each.tolist() for each in logits], copied_BTH.tolist(), decoded), held


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "size"), [("untied", 4), ("tied", 2), ("medusa", 2), ("sequential", 2), ("adapters", 2)]
)
def test_a_policy_loaded_in_shards_computes_generates_and_saves_the_same(
    name, size, directory, storage, tmp_path
):
    table = ModelTable(base=str(directory(name)), n_future=K, **MODELS[name][2])

    shards = together(size, tmp_path / "store", partial(measured, table, storage, tmp_path / "shards.pt"))
    expected, held = measured(table, storage, tmp_path / "alone.pt")

    assert all(found == expected for found, _ in shards)
    for parameter, (_, whole) in held.items():
        assert sum(own[parameter][0] for _, own in shards) in (whole, size * whole)
    total = sum(whole for _, whole in held.values())
    assert all(sum(part for part, _ in own.values()) < 1.2 * total / size for _, own in shards)
    one, other = (torch.load(tmp_path / f"{each}.pt", weights_only=True) for each in ("alone", "shards"))
    assert list(one) == list(other)
    assert all(torch.equal(one[each], other[each]) for each in one)
    for each in ("alone", "shards"):
        base = load(table, storage)
        load_model(base.policy, tmp_path / f"{each}.pt")
        merge_adapters(base.policy)
        facts = ExportFacts(
            n_future=K, heads=table.heads.kind, run="r", recipe_sha256="0", base="b", data_sha256=None
        )
        write_export(base.policy, base.tokenizer, tmp_path / each, facts=facts, recipe=b"")
    files = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*"))
    assert files
    for file in files:
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "shards" / file).read_bytes()


def changed(path, name, change):
    for file in path.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            save_file({**state, name: change(state[name].clone())}, file, metadata={"format": "pt"})


def refusal(table, storage, distributed):
    with pytest.raises(WmtpError) as caught:
        load(table, storage, distributed=distributed, mesh=mesh_of(distributed, torch.device("cpu")))
    return str(caught.value)


def spoil_last(tensor):
    tensor[-1, -1] = torch.nan
    return tensor


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_last, "1 tensors contain NaN or infinity: `model.layers.1.mlp.up_proj.weight`"),
        (lambda tensor: tensor[:-1].clone(), "1 tensors have other shapes than in the config"),
    ],
)
def test_all_processes_refuse_a_fault_in_the_rows_of_one_process(
    change, message, directory, storage, tmp_path
):
    path = directory("untied")
    changed(path, "model.layers.1.mlp.up_proj.weight", change)
    table = evolve(MICRO, base=str(path))

    refusals = together(2, tmp_path / "store", partial(refusal, table, storage))

    assert len(set(refusals)) == 1
    assert message in refusals[0]
