"""Policies that other libraries wrote act as those libraries themselves say, where they are installed.

They are not in requirements.txt: pip install stable-baselines3 sb3-contrib d3rlpy
"""

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.foreign import load_policy
from tests.foreign import A, S, acts, refused


def hopper():
    return gym.make("Hopper-v4")


def sb3(name):
    library = pytest.importorskip(
        "sb3_contrib" if name in ("TQC", "TRPO", "CrossQ", "RecurrentPPO") else "stable_baselines3"
    )
    return getattr(library, name)


def agrees(path, model, raw_data, normalise=lambda obs: obs, **options) -> dict:
    """Read `path` and compare with the actions that `model` itself predicts."""
    policy = load_policy(path, raw_data, **options)
    obs = raw_data.obs[:60].double().numpy()
    want = model.predict(normalise(obs), deterministic=True)[0]
    np.testing.assert_allclose(acts(policy, raw_data).numpy(), want, rtol=1e-3, atol=1e-4)
    return policy


OFF_POLICY = dict(learning_starts=20, batch_size=16, buffer_size=1_000)
ON_POLICY = dict(n_steps=32)
MODELS = {
    "SAC": OFF_POLICY, "TD3": OFF_POLICY, "DDPG": OFF_POLICY, "TQC": OFF_POLICY, "CrossQ": OFF_POLICY,
    "PPO": ON_POLICY | dict(batch_size=16), "A2C": ON_POLICY, "TRPO": ON_POLICY | dict(batch_size=16),
}  # fmt: skip


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_stable_baselines(name, normalised, raw_data):
    algorithm = sb3(name)
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = DummyVecEnv([hopper])
    if normalised:
        env = VecNormalize(env)
    kwargs = {"net_arch": [32, 16], "activation_fn": torch.nn.ELU if normalised else torch.nn.Tanh}
    model = algorithm("MlpPolicy", env, policy_kwargs=kwargs, device="cpu", seed=3, **MODELS[name]).learn(64)
    model.save("model.zip")
    if not normalised:
        agrees("model.zip", model, raw_data)
        return
    refused("model.zip", raw_data, "VecNormalize")
    env.save("vecnormalize.pkl")
    agrees("model.zip", model, raw_data, env.normalize_obs)


def test_stable_baselines_that_are_not_read(raw_data):
    recurrent = sb3("RecurrentPPO")("MlpLstmPolicy", hopper(), n_steps=16, batch_size=16, device="cpu")
    recurrent.save("recurrent.zip")
    refused("recurrent.zip", raw_data, "RecurrentPPO")
    sb3("SAC")("MlpPolicy", hopper(), use_sde=True, device="cpu").save("sde.zip")
    refused("sde.zip", raw_data, "gSDE")
    from stable_baselines3.common.torch_layers import FlattenExtractor

    class Scaled(FlattenExtractor):
        def forward(self, observations):
            return 2 * super().forward(observations)

    sb3("TD3")("MlpPolicy", hopper(), policy_kwargs={"features_extractor_class": Scaled}, device="cpu").save(
        "scaled.zip"
    )
    refused("scaled.zip", raw_data, "features extractor")


@pytest.mark.parametrize("name", ["TD3PlusBC", "IQL", "SAC"])
def test_d3rlpy(name, raw_data, monkeypatch):
    """With its scalers, from its ONNX files and its TorchScript."""
    d3rlpy = pytest.importorskip("d3rlpy")
    rows = [x.numpy() for x in (raw_data.obs, raw_data.actions, raw_data.rewards, raw_data.terminations)]
    rows[-1][-1] = 1
    dataset = d3rlpy.dataset.MDPDataset(*rows)
    scalers = dict(observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
                   action_scaler=d3rlpy.preprocessing.MinMaxActionScaler())  # fmt: skip
    algorithm = getattr(d3rlpy.algos, f"{name}Config")(batch_size=16, **scalers).create(device="cpu")
    log = d3rlpy.logging.NoopAdapterFactory()
    algorithm.fit(dataset, n_steps=20, n_steps_per_epoch=20, logger_adapter=log, show_progress=False)
    export = torch.onnx.export  # d3rlpy 2 was written for PyTorch's former exporter
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: export(*args, **kwargs | {"dynamo": False}))
    want = algorithm.predict(raw_data.obs[:60].numpy()).clip(-1, 1)
    for path, trust in (("policy.onnx", False), ("policy.pt", True)):
        algorithm.save_policy(path)
        policy = load_policy(path, raw_data, trust)
        np.testing.assert_allclose(acts(policy, raw_data).numpy(), want, rtol=1e-3, atol=1e-4)


def test_what_is_not_read_of_d3rlpy(raw_data):
    d3rlpy = pytest.importorskip("d3rlpy")
    algorithm = d3rlpy.algos.IQLConfig(batch_size=16).create(device="cpu")
    algorithm.create_impl((S,), A)
    algorithm.save("model.d3")
    algorithm.save_model("model.pt")
    for path in ("model.d3", "model.pt"):
        refused(path, raw_data, "d3rlpy", "save_policy")
    transformer = d3rlpy.algos.DecisionTransformerConfig(context_size=5).create(device="cpu")
    transformer.create_impl((S,), A)
    transformer.save_policy("policy.pt")
    refused("policy.pt", raw_data, "inputs", "Decision Transformer", trust=True)


@pytest.mark.parametrize("dynamo", [False, True])
def test_pytorch_exports_of_ours(dynamo, raw_data):
    """PyTorch's two exporters; the newer puts weights into a second file."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers = torch.nn.Linear(S, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, A), torch.nn.Tanh()
    net = torch.nn.Sequential(*layers).requires_grad_(False).eval()
    batch = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"obs": {0: "n"}}}
    torch.onnx.export(net, (torch.zeros(2, S),), "policy.onnx", input_names=["obs"], dynamo=dynamo, **batch)
    got = acts(load_policy("policy.onnx", raw_data), raw_data)
    torch.testing.assert_close(got, net(raw_data.obs[:60]), rtol=1e-4, atol=1e-5)
