"""Widths of networks: arguments of every script, carried by the files that they write."""

import pytest
import torch

import o2td3
import offline
from common import cli, policies
from common.nn import ensemble_mlp, widths_of
from offline import cql
from tests.conftest import TINY
from tests.test_pipeline import SMALL
from tests.test_transfer import checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_widths_reach_every_network_and_its_file(run_script, runs):
    widths = ["--hidden", "24", "16", "--critic-hidden", "32", "8"]
    code, _, err = run_script(o2td3, *SMALL, *TINY, "--run-dir", runs, "--offline", "td3_bc", *widths)
    assert code == 0, err
    trained = policies.read(runs / "hopper-medium-demo__td3_bc-4-24x16__0" / "policy.pt")
    folder = runs / "hopper-medium-demo__o2td3__td3_bc__0"
    assert trained["hidden_layers"] == [24, "ReLU", 16, "ReLU"] == policies.read(folder / "policy.pt")["hidden_layers"]
    assert trained["critic"]["hidden_layers"] == [24, 16]  # all networks there have the same
    agent = torch.load(folder / "finetune.pt", weights_only=True)["state"]["agent"]
    critic = ensemble_mlp(2, 14, (32, 8), 1, layer_norm=True)
    critic.load_state_dict({key[11:]: value for key, value in agent.items() if key.startswith("critic.net.")})


def test_a_policy_keeps_its_own_widths(run_script, runs, tmp_path):
    path = runs / "hopper-medium-demo__td3_bc-4-24x16__0" / "policy.pt"
    flags = [*SMALL, *TINY, "--run-dir", tmp_path / "runs", "--offline", path]
    code, _, err = run_script(o2td3, *flags, "--hidden", "8")
    assert code == 2 and err == f"error: {path} keeps the layers that it has (24 ReLU 16 ReLU); leave --hidden out\n"
    assert not (tmp_path / "runs").exists()
    code, _, err = run_script(o2td3, *flags, "--no-reevaluate", "--no-align", "--online-steps", "70")
    assert code == 0, err  # with its critics, which have widths of their own, too


def test_a_policy_from_elsewhere_is_distilled_into_them():
    args, found = o2td3.Args(offline="x.onnx", hidden=(24, 16)), checkpoint("squashed_gaussian") | {"kind": "function"}
    offline.check_hidden(args, found)
    assert found["hidden_layers"] == [24, "ReLU", 16, "ReLU"]


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(cli.UserError, match="^--critic-hidden is 0, but has to be at least 1$"):
        cli.complete(o2td3.Args(critic_hidden=(256, 0)))
    path = tmp_path / "mine.py"
    source = (offline.Path(offline.__file__).parent / "bc.py").read_text()
    path.write_text(source.replace("    hidden: ", "    width: ").replace("args.hidden", "args.width"))
    with pytest.raises(cli.UserError, match="mine.py has no argument hidden"):
        offline.algorithm_args(o2td3.Args(offline=str(path), hidden=(8,)))


def test_a_file_of_the_time_when_layers_were_counted_goes_on():
    policy = {"learner": {"args": {"hidden_layers": 2, "critic_layers": 3, "tau": 0.1}}}
    policies.name_widths(policy)
    assert policy["learner"]["args"] == {"hidden": [256, 256], "critic_hidden": [256] * 3, "tau": 0.1}
    assert widths_of(cql.Critic(11, 3, policy["learner"]["args"]["critic_hidden"]).net) == [256] * 3
