"""Engines: those that cannot work stop at the start, the ready configs run, and DDP's corners are one process's run."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.utils import DistributedType
from forks import ranks
from helpers import arguments, tiny_llama
from launch import SCRIPTS, accelerate_launch, well
from test_other_engine import ROWS, assert_goes_on, run

from grass_hf.convert.conversion import is_converted
from grass_hf.integrations import accelerate as accelerate_side
from grass_hf.integrations import trainer as integration

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
GPUS = sorted(file.name for file in CONFIGS.glob("*gpu*.yaml") if "zero" not in file.name)


def test_sharded_models_are_refused_with_a_sentence(tmp_path):
    """Tensor parallelism by torch, and all that transformers itself does at loading."""
    for said in ranks(2, "refusals", str(tmp_path)):
        lines = dict(line.split(": ", 1) for line in said.splitlines() if line.startswith("refused"))
        assert lines.keys() == {f"refused {name}" for name in ("torch_tp", "hf_tp", "hf_fsdp", "hf_pp", "trainer")}
        torch_tp = lines.pop("refused torch_tp")
        assert "model.layers.0.mlp.up_proj.weight is sharded already" in torch_tp and "use FSDP2" in torch_tp
        for sentence in lines.values():
            assert "was split by transformers when it was loaded (DistributedConfig" in sentence
            assert "load it without distributed_config" in sentence


def start(tmp_path, **patched):
    """The sentence with which the Trainer's start stops; the model is as it was."""
    args = arguments(tmp_path)
    for name, value in patched.items():
        setattr(args, name, value)
    model = tiny_llama()
    with pytest.raises(ValueError) as error:
        integration.FollowTraining().on_init_end(args, None, None, model=model)
    assert not is_converted(model)
    return str(error.value)


def test_data_parallel_threads_are_refused(tmp_path):
    """One process that sees two GPUs; what it would see is put in."""
    assert "2 GPUs and the Trainer would use nn.DataParallel" in start(tmp_path, _n_gpu=2)


@pytest.mark.parametrize("kind", [DistributedType.XLA, DistributedType.MEGATRON_LM])
def test_other_engines_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(integration, "engine_kind", lambda: kind)
    said = start(tmp_path)
    assert f"does not run under {kind.value} yet" in said and "use DDP" in said


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_parallelism_within_a_sequence_or_matrix_is_refused(tmp_path, monkeypatch, kind):
    """What accelerate would say of itself is put in: it refuses these on a CPU."""

    class State:
        _shared_state = ("set up",)
        fsdp_plugin = None
        parallelism_config = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, f"{kind}_size": 2})

    monkeypatch.setattr(accelerate_side, "AcceleratorState", State)
    monkeypatch.setattr(integration, "engine_kind", lambda: DistributedType.MULTI_GPU)
    assert f"{kind}_size=2 in the parallelism config" in start(tmp_path)


@pytest.mark.parametrize("even", [False, True], ids=["uneven", "evened"])
def test_a_last_batch_that_does_not_divide(tmp_path, even):
    """13 sequences in batches of 8: ranks get four and one of the last five; evened, accelerate repeats three."""
    options = {"sequences": 13, "accelerator_config": {"even_batches": even}, "dataloader_drop_last": False}
    two, _ = run(tmp_path, "two", "ddp", 2, optim_args=ROWS, **options)
    one, _ = run(tmp_path, "one", "ddp", 1, optim_args=ROWS, **options)
    if even:
        assert two["losses"][1] == pytest.approx(one["losses"][1], abs=1e-6)
        assert two["losses"][2] != pytest.approx(one["losses"][2], abs=1e-6)  # a batch of eight and one of five
        assert two["losses"][8] < two["losses"][1] - 0.3
    else:
        assert_goes_on(two, one, 0)


@pytest.mark.dist
def test_compiled_under_ddp(tmp_path):
    """Without an inductor compiler; the graphs are what torch.compile makes of the tap under DDP."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled, _ = run(tmp_path, "compiled", "ddp", 2, optim_args=ROWS, **options)
    plain, _ = run(tmp_path, "plain", "ddp", 2, optim_args=ROWS)
    assert_goes_on(compiled, plain, 0)


def turned_down(tmp_path, name, processes):
    """A config file for as many processes, on the CPU."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    config["num_processes"] = processes
    config["mixed_precision"] = "no"  # the Trainer refuses bf16 on what it takes for a GPU without it
    if "parallelism_config" in config:
        config["parallelism_config"]["parallelism_config_dp_shard_size"] = processes // 2
    if config["distributed_type"] == "FSDP":
        config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
    if processes == 1:
        config["use_cpu"] = True
    file = tmp_path / name
    file.write_text(yaml.safe_dump(config))
    return file


def script(sharded):
    return ["cpu_fsdp.py", str(SCRIPTS / "fsdp_trainer.py")] if sharded else ["fsdp_trainer.py"]


def losses_of(done, processes):
    assert f"world {processes}" in well(done).stdout
    losses = json.loads(re.search(r"losses (\[.*\])", done.stdout).group(1))
    assert losses[-1] < losses[0] - 0.3
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in GPUS if "2x" not in name])
def test_every_config_runs_with_fewer_devices(tmp_path, name):
    processes = 1 if name == "1gpu.yaml" else 2
    file = turned_down(tmp_path, name, processes)
    sharded = "fsdp" in name
    settings = json.dumps({"output_dir": str(tmp_path / "out"), "use_cpu": not sharded})
    done = accelerate_launch(file, *script(sharded), settings)
    losses_of(done, processes)
    assert (f"sharded over {processes}" in done.stdout) == sharded


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in GPUS if "2x" in name])
def test_the_two_node_configs_run_on_two_launchers(tmp_path, name):
    file = turned_down(tmp_path, name, 4)
    sharded = "hsdp" in name
    settings = json.dumps({"output_dir": str(tmp_path / "out"), "use_cpu": not sharded})
    port = str(random.randint(20000, 40000))

    def node(rank):
        where = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        return accelerate_launch(file, *script(sharded), settings, port=port, options=where)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(node, range(2))
    well(second)
    losses_of(first, 4)
    assert ("sharded over 4 as 2 x 2" in first.stdout) == sharded
