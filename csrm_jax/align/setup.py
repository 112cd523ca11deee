"""What an alignment run is made of: models, judges, optimizers, programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csrm_jax import checkpoint, sharding
from csrm_jax.align import agent as agents
from csrm_jax.align import (
  constitution,
  descent,
  feedback,
  imitation,
  lagrange,
  limits,
  ppo,
  prompts,
  rollout,
  rule_reward,
)
from csrm_jax.align.feedback import (
  ComplianceFunction,
  Constraint,
  RewardFunction,
)
from csrm_jax.align.ppo import AlignState
from csrm_jax.align.rollout import Rollouts
from csrm_jax.config import Config
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.judge import SHIPPED, Judge, load
from csrm_jax.model import reward as reward_models
from csrm_jax.rules import reward as rule_rewards
from csrm_jax.storage import AnyPath
from csrm_jax.train import loop
from csrm_jax.train import optimizer as optimizers
from csrm_jax.types import Params, TrainState

WITH_CRITICS = ("ppo", "shaping", "plain")
WITHOUT_CRITICS = ("grpo", "rloo", "reinforce")
SUPERVISED = "sft"  # on given responses
OFFLINE = (SUPERVISED, "dpo", "ipo")  # the others on given pairs
WITHOUT_MULTIPLIERS = (*OFFLINE, "distill")  # one step of the policy an update
UNTRAINED = ("best_of_n", "constitutional")  # responses, and no update
# (tokens [x l], length [x], mask of what to imitate [x l]) of a step.
Imitation = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]


class Setup(NamedTuple):
  """What stays the same through a run.

  Offline methods may do without specs, and then without prompts; without a
  reward model, without reward.
  """

  config: Config
  workdir: AnyPath
  tokenizer: Tokenizer
  bound: list[Constraint]
  train: list[prompts.Prompt]
  heldout: list[prompts.Prompt]
  reward: RewardFunction | None  # the rule-based part included
  rules: rule_rewards.RuleReward | None
  compliance: ComplianceFunction
  monitor: ComplianceFunction | None
  networks: agents.Networks
  agent: ppo.Agent
  frozen: Params
  mesh: Mesh
  imitated: Imitation | None  # rows of step k


def set_up(
  config: Config,
  workdir: AnyPath,
  reward: RewardFunction | None,
  compliance: ComplianceFunction | None,
) -> tuple[Setup, Params]:
  """All but the state, and the trained leaves that it starts from."""
  align = config.align
  offline = align.method in OFFLINE
  optional = offline and not align.specs
  bound = [] if optional else feedback.constraints(config)
  if align.method == "constitutional":
    bound += constitution.principles(bound)
  train: list[prompts.Prompt] = []
  heldout: list[prompts.Prompt] = []
  if bound or align.reward or reward is not None:
    train, heldout = prompts.read(align.prompts, heldout=align.heldout)
  tokenizer = loop.load_tokenizer(config)
  mesh = sharding.make_mesh(**config.mesh)
  rows = align.prompts_per_step * align.samples
  if offline:
    sft = align.method == SUPERVISED
    rows = align.ptx_rows if sft else align.pairs_per_step
  sharding.check_rows(rows, 1, mesh)
  judge = _loaded(config, align.judge or str(SHIPPED)) if bound else None
  rewarder = _loaded(config, align.reward) if align.reward else judge
  if reward is None and rewarder is not None:
    needed = not offline and align.method not in UNTRAINED
    if needed or align.reward or align.reward_spec or rewarder.has_helpfulness:
      reward = feedback.reward_of(rewarder, spec=align.reward_spec)
  rules = rule_reward.rules_of(config, judge, bound)
  if rules is not None and reward is not None:
    reward = rule_rewards.total(reward, rules, weight=align.rbr_weight)
  if reward is not None:
    reward = feedback.scaled(reward, align.reward_scale)
  if compliance is None:
    compliance = feedback.compliance_of(judge, bound)
  monitor = None
  if align.monitor:
    monitor = feedback.compliance_of(_loaded(config, align.monitor), bound)
  policy, load_policy = _policy(config, tokenizer)
  networks = agents.Networks(policy)
  params = {
    "policy": load_policy(jax.random.split(jax.random.key(config.seed), 3)[0])
  }
  if align.method in WITH_CRITICS and judge and rewarder:
    critics, started = _critics(config, policy, rewarder, judge, len(bound))
    networks, params = networks._replace(**critics), params | started
  trained, frozen = agents.split(
    networks, params, heads_only=heads_only(config)
  )
  frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
  setup = Setup(
    config=config,
    workdir=workdir,
    tokenizer=tokenizer,
    bound=bound,
    train=train,
    heldout=heldout,
    reward=reward,
    rules=rules,
    compliance=compliance,
    monitor=monitor,
    networks=networks,
    agent=agents.make_agent(
      networks, chunk=align.logit_tokens, temperature=align.temperature
    ),
    frozen=frozen,
    mesh=mesh,
    imitated=_imitation(config, tokenizer),
  )
  return setup, trained


def _loaded(config: Config, path: str) -> Judge:
  """A model that scores; `align.judge_dtype` says how it computes."""
  return load(path).computing(config.align.judge_dtype)


def _imitation(config: Config, tokenizer: Tokenizer) -> Imitation | None:
  """Rows of step k to imitate, beside the policy gradient or alone."""
  align = config.align
  alone = align.method == SUPERVISED
  if not (align.ptx_weight or alone):
    return None
  if not align.ptx:
    flag = "method=sft" if alone else f"ptx_weight={align.ptx_weight}"
    raise ValueError(
      f"--config.align.{flag} without anything to imitate: name JSON lines of"
      " messages by --config.align.ptx=FILE"
    )
  rows = imitation.read(
    align.ptx,
    tokenizer,
    room=align.prompt_length + align.response_length,
  )
  return lambda k: imitation.batch(
    rows, seed=config.seed, step=k, count=align.ptx_rows
  )


def respond(
  setup: Setup,
  trained: Params,
  asked: Sequence[prompts.Prompt],
  *,
  samples: int,
  key: jax.Array,
) -> Rollouts:
  """Responses of the policy of these trained leaves, in one shape."""
  align = setup.config.align
  return rollout.sample(
    setup.networks.policy,
    agents.join(trained["policy"], setup.frozen["policy"]),
    setup.tokenizer,
    asked,
    key=key,
    samples=samples,
    prompt_length=align.prompt_length,
    response_length=align.response_length,
    temperature=align.temperature,
    spec=feedback.policy_spec(setup.config, setup.bound),
    rows=align.prompts_per_step * align.samples,
    on_long="cut",
    mesh=setup.mesh,
  )


def _policy(
  config: Config, tokenizer: Tokenizer
) -> tuple[reward_models.RewardModel, reward_models.LoadParams]:
  align = config.align
  return reward_models.make(
    config.model,
    vocab_size=tokenizer.vocab_size,
    row_length=align.prompt_length + align.response_length,
    language_model=True,
  )


def heads_only(config: Config) -> bool:
  """Whether critics train their heads alone.

  Raises:
    ValueError: align.critic_trains is neither "all" nor "head".
  """
  chosen = config.align.critic_trains
  if chosen not in ("all", "head"):
    raise ValueError(
      f"--config.align.critic_trains={chosen!r}: use one of 'all', 'head'"
    )
  return chosen == "head"


def _critics(
  config: Config,
  policy: reward_models.RewardModel,
  rewarder: Judge,
  judge: Judge,
  k: int,
) -> tuple[dict[str, Any], Params]:
  """Critics of the reward and of k constraints, their first parameters."""
  keys = jax.random.split(jax.random.key(config.seed), 3)
  still = heads_only(config)
  reward_critic = agents.critic_model(rewarder.model, policy, heads_only=still)
  reward_params = agents.critic(
    reward_critic,
    rewarder.params,
    keys[1],
    rows=config.align.reward_scale * rewarder.params["head"]["kernel"][1:],
    bias=jnp.zeros(1, jnp.float32),
    alpha=rewarder.model.lora_alpha,
    heads_only=still,
  )
  cost_row = -judge.params["head"]["kernel"][:1] / judge.temperature
  rate = config.align.cost == "rate"
  cost_critic = agents.critic_model(judge.model, policy, heads_only=still)
  cost_params = agents.critic(
    cost_critic,
    judge.params,
    keys[2],
    # sigmoid(c) is c / 4 + 1/2 near 0: so a rate starts from its logit.
    rows=jnp.tile(cost_row / 4 if rate else cost_row, (k, 1)),
    bias=jnp.full(k, 0.5 if rate else 0.0, jnp.float32),
    alpha=judge.model.lora_alpha,
    heads_only=still,
  )
  critics = {"reward_critic": reward_critic, "cost_critic": cost_critic}
  return critics, {"reward_critic": reward_params, "cost_critic": cost_params}


def make_optimizers(config: Config):
  """AdamW for each model; critics have their own rate and train their head."""
  align = config.align
  steps = config.steps
  if align.method not in WITHOUT_MULTIPLIERS:
    steps *= align.epochs * align.minibatches
  own = dict(config.optimizer)
  critic = own | {"lr": align.critic_lr, "head_lr": 1.0}
  names = ppo.MODELS
  if align.method not in WITH_CRITICS:
    names = names[:1]
  return {
    name: optimizers.make_optimizer(
      steps=steps, **(own if name == "policy" else critic)
    )
    for name in names
  }


def _multiplier_optimizer(config: Config) -> optax.GradientTransformation:
  return optax.sgd(config.align.multiplier.lr)


def start(
  setup: Setup, optimizer, params: Params, saved
) -> AlignState | TrainState:
  """The newest checkpoint, or the state before the first update."""
  config, mesh = setup.config, setup.mesh
  fresh = functools.partial(
    first_state, config=config, optimizer=optimizer, k=len(setup.bound)
  )
  shape = jax.eval_shape(fresh, params)
  held = sharding.shardings(shape, mesh)
  latest = saved.latest_step()
  if latest is not None:
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shape,
      held,
    )
    return checkpoint.restore(saved, latest, abstract)
  # A judge's leaves, that critics begin with, lie on one device.
  params = jax.device_put(params, held.params)
  return jax.jit(fresh, out_shardings=held)(params)


def first_state(
  params: Params, *, config: Config, optimizer: Any, k: int
) -> AlignState | TrainState:
  """The state before the first update, of trained leaves and k constraints."""
  if config.align.method in WITHOUT_MULTIPLIERS:
    return descent.init_state(params, optimizer)
  chosen = config.align.multiplier
  multiplier = lagrange.init(
    k,
    lam0=chosen.start,
    window=chosen.window,
    optimizer=_multiplier_optimizer(config),
  )
  return ppo.init_state(params, optimizer, multiplier)


def update_keywords(config: Config, bound: Sequence[Constraint]) -> Any:
  """Keywords of `ppo.update` that the configuration gives."""
  align, chosen = config.align, config.align.multiplier
  rates = jnp.asarray([c.limit for c in bound], jnp.float32)
  drawn = align.judged if 0 < align.judged < len(bound) else len(bound)
  aim = functools.partial(
    ppo.targets,
    kl_coefficient=align.kl,
    discount=align.discount,
    gae_lambda=align.gae_lambda,
    critic_lambda=align.critic_lambda,
    score_clip=align.score_clip,
    whiten=align.whiten,
    judged=drawn / len(bound),
  )
  if align.method in WITHOUT_CRITICS:
    aim = functools.partial(
      ppo.targets_without_critics,
      method=align.method,
      kl_coefficient=align.kl,
    )
  pid = None
  if chosen.proportional or chosen.derivative:
    pid = (chosen.proportional, 1.0, chosen.derivative)
  return {
    "multiplier": {
      "limits": limits.limits_of(rates, form=align.cost),
      "optimizer": _multiplier_optimizer(config),
      "lam_max": chosen.most,
      "lam_min": chosen.least,
      "delay": chosen.delay,
      "pid": pid,
      "pessimism": chosen.confidence,
    },
    "aim": aim,
    "clip": align.clip,
    "value_clip": align.value_clip,
    "ptx_weight": align.ptx_weight,
    "costs_matter": align.method not in ("shaping", "plain"),
    "shaping": align.shaping if align.method == "shaping" else 0.0,
  }


def compile_update(
  abstract: AlignState,
  frozen: Params,
  mesh: Mesh,
  *,
  agent: ppo.Agent,
  optimizer: Any,
  keywords: Any,
) -> Callable[..., tuple[AlignState, ppo.Metrics]]:
  """`ppo.update` under jit on a mesh; the state's buffers are donated."""

  def step(state, frozen, episodes, indices, ptx):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return ppo.update(
        state,
        frozen,
        episodes,
        indices,
        ptx,
        agent=agent,
        optimizers=optimizer,
        **keywords,
      )

  held = sharding.shardings(abstract, mesh)
  still = sharding.shardings(frozen, mesh)
  rows = sharding.batch_sharding(mesh)
  everywhere = NamedSharding(mesh, P())
  return jax.jit(
    step,
    in_shardings=(held, still, rows, everywhere, rows),
    out_shardings=(held, everywhere),
    donate_argnums=(0,),
  )


def sees_once(config: Config) -> bool:
  """Whether an update sees all its responses once, all at a time."""
  return config.align.epochs * config.align.minibatches == 1


def compile_estimates(setup: Setup) -> Callable[..., dict[str, Any]]:
  """`agents.estimates` under jit on the mesh."""
  mesh, once = setup.mesh, sees_once(setup.config)

  def estimates(trained, frozen, tokens, length):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return agents.estimates(
        setup.agent, trained, frozen, tokens, length, once=once
      )

  return jax.jit(estimates, out_shardings=sharding.batch_sharding(mesh))
