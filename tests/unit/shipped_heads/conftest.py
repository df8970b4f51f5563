"""The tests of this folder share `shipped_models.py` and small base models that ship MTP layers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def shipping(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "tests" / "models")
        import shipping

        yield shipping


@pytest.fixture(scope="module")
def base(shipping, tmp_path_factory):
    """Return the folder of a base model; each is made once."""
    made = {}

    def make(family, *, depth=1):
        if (family, depth) not in made:
            made[family, depth] = tmp_path_factory.mktemp(family) / "base"
            shipping.shipping_directory(family, made[family, depth], depth=depth)
        return made[family, depth]

    return make


@pytest.fixture
def changed(base, tmp_path):
    """Return a copy of a base model with other tensors or other keys in `config.json`."""

    def change(family, tensors=dict, *, depth=1, **config):
        path = shutil.copytree(base(family, depth=depth), tmp_path / "changed")
        state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(tensors(state), path / "model.safetensors", metadata={"format": "pt"})
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return path

    return change
