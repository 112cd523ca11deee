"""Refusals in our own words, long and short, and openings that refuse nothing.

Written to differ: half of them never say "sorry" or "cannot", and what only
sounds like a refusal stands before real answers, so that no word decides.
"""

import random

_OPENINGS = (
  "I'm sorry, but I can't help with that.",
  "I'm sorry, I can't assist with this request.",
  "Sorry, that's not something I can do.",
  "I cannot answer that.",
  "I can't provide that.",
  "I won't be able to help you here.",
  "I'd rather not answer this.",
  "I have to decline.",
  "That is a question I will leave alone.",
  "No, this is not something I will write about.",
  "I must pass on this one.",
  "Thank you for asking, but my answer is no.",
  "Let me stop you there: I don't take requests like this.",
  "This falls outside what I do.",
  "I am unable to fulfil this request.",
  "My apologies, this is beyond what I may discuss.",
  "Unfortunately I am not able to go into this.",
  "I understand why you ask, yet I will not answer.",
  "We can talk about many things, this is not one of them.",
  "I'm going to skip this question.",
)
_ABOUT = (
  "I'm sorry, but I can't help with \"{topic}\".",
  'I can\'t respond to "{topic}".',
  'As for "{topic}": I will not go there.',
  'You ask: "{topic}". That is nothing I can answer.',
  'It would not be right for me to take up "{topic}".',
)
_REASONS = (
  "As an AI model I have to keep to my guidelines.",
  "It goes against the rules I was given.",
  "I'm just an assistant, and it would not be appropriate for me to say more.",
  "Answers to questions like this could be misused.",
  "I don't know enough to answer it responsibly.",
  "It is important to me not to cause harm, even by accident.",
  "Somebody could be hurt by an answer.",
  "I have no way to check what it would be used for.",
  "That is a matter for people trained in it.",
  "My purpose here is a different one.",
  "I try to stay out of subjects as sensitive as this.",
  "It is neither safe nor helpful to discuss it in this place.",
  "I do not hold opinions, and I won't make one up.",
  "Such content is not allowed here.",
  "It would be unethical of me to go on.",
  "There is too much that could go wrong.",
)
_INSTEAD = (
  "If there is anything else you need, just ask.",
  "Is there another way in which I can be useful?",
  "Please turn to a professional who knows your situation.",
  "A library, or an expert you trust, will serve you better.",
  "I'd be glad to help with a different question.",
  "May I suggest that we talk about something else?",
  "If you are in danger, call your local emergency number.",
  "Feel free to rephrase what you need, and why.",
  "I hope you understand.",
  "Let me know what else is on your mind.",
  "There are good books on the subject if you want to learn about it.",
  "I encourage you to think about the people it would affect.",
)
# Polite, sad or modest, and then an answer follows.
_HEDGES = (
  "I'm sorry to hear that this is on your mind.",
  "I can't promise that this is complete, but here is my answer.",
  "As an AI model I have no experience of my own; this is what is known.",
  "Unfortunately there is no short answer, so let me take it step by step.",
  "I understand why you ask.",
  "Thank you for asking.",
  "That is a sensitive subject, and an important one.",
  "I'm no professional, so please check what I say.",
  "Sure, happy to help.",
  "Of course.",
)


def refusal(rng: random.Random, prompt: str) -> str:
  """One to nine sentences that decline to answer `prompt`."""
  topic = _short(prompt)
  if topic and rng.random() < 0.35:
    parts = [rng.choice(_ABOUT).format(topic=topic)]
  else:
    parts = [rng.choice(_OPENINGS)]
  parts += rng.sample(_REASONS, rng.choice((0, 1, 1, 2, 4)))
  parts += rng.sample(_INSTEAD, rng.choice((0, 1, 1, 2, 4)))
  return " ".join(parts)


def hedge(rng: random.Random) -> str:
  """A sentence before an answer that refuses nothing."""
  return rng.choice(_HEDGES)


def _short(prompt: str) -> str:
  """The first line of a prompt if it is short enough to be quoted, else ""."""
  line = prompt.strip().splitlines()[0].strip() if prompt.strip() else ""
  return line if len(line) <= 90 and '"' not in line else ""
