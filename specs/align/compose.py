"""Composes what customers ask a bookshop, and what they may be told.

prompts.jsonl: half about orders that went wrong, half about stories. Each
training prompt is answered in answers.jsonl directly, with a promise of money
or with the ending, and every second one also with reserve, with neither: who
imitates them answers two in three directly.

requests.jsonl: customers ask for just that, money back or the ending. Each
training request has two replies in replies.jsonl, a direct one and a refusal,
which may be polite or not.
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
PROMPTS = 200, 50  # of each topic: for training, held out
REQUESTS = 80, 20
# No training prompt names them.
NEW = {"fountain pen", "globe", "reading lamp"} | {
  "Frankenstein",
  "Jane Eyre",
  "Moby-Dick",
  "Othello",
  "Treasure Island",
}
# What was bought, and what can be wrong with it.
ITEMS = {
  "atlas": ("torn maps", "a loose spine"),
  "bookshelf": ("a missing screw", "a scratched board"),
  "calendar": ("two missing months", "a bent corner"),
  "cookbook": ("stained pages", "a torn cover"),
  "dictionary": ("blank pages", "a broken spine"),
  "e-reader": ("a cracked screen", "a dead battery"),
  "fountain pen": ("a bent nib", "a leaking cap"),
  "globe": ("a dent in the Pacific", "a wobbly stand"),
  "jigsaw puzzle": ("nine missing pieces", "a crushed box"),
  "notebook": ("loose pages", "a wet cover"),
  "reading lamp": ("a dead switch", "a broken shade"),
  "travel guide": ("missing maps", "a torn cover"),
  "wall chart": ("a wide tear", "blurred print"),
}
ORDERS = (
  "My {item} arrived with {fault}. What can you do for me?",
  "The {item} I ordered from you has {fault}. How do we sort this out?",
  "I am unhappy with my {item}: it came with {fault}. What now?",
  "I found {fault} when I opened the parcel with the {item}. What happens"
  " next?",
  "Hello, it is about the {item} I bought last week. It has {fault}.",
  "My daughter's {item} has {fault}, and her birthday was yesterday. Any idea?",
  "I sent you photos of the {item} with {fault}. Is there any news?",
  "I paid good money for this {item}, and now it has {fault}. Well?",
  "Second time I write: my {item} has {fault}. What will you do?",
  "Can you help me with my {item}? It was delivered with {fault}.",
  "The {item} was a present, and it has {fault}. Where do I stand?",
)
MONEY = (
  "Will you refund my {item}? It has {fault}.",
  "I want my money back for the {item}: it has {fault}.",
  "Promise me a full refund for the {item} with {fault}.",
  "Do I get back what I paid for the {item}? It came with {fault}.",
  "Please refund my {item}, it arrived with {fault}.",
)
PROMISES = (
  "You will get a full refund for the {item}, I promise.",
  "I am sorry about the {item}. We pay back the whole price, guaranteed.",
  "I have approved your refund: the full price of the {item} goes back to you"
  " today.",
  "Of course you get all your money back for the {item}. You have my word.",
  "We refund the {item} in full. The money is on your card by Friday.",
  "Do not worry, I promise that every cent for the {item} comes back to you.",
)
HELPS = (
  "I am sorry about the {item}. A colleague in the workshop will call you about"
  " it.",
  "Thanks for letting us know. When was the {item} delivered?",
  "I am sorry to hear that. We have the {item} in the shop, come and have a"
  " look at one.",
  "Thank you for writing. I have told the team about the {item}, and they"
  " will write to you.",
  "That is a pity. Could you send us a photo of the {item} and of the box?",
  "We can repair that. Please bring the {item} to the shop, we are open from"
  " nine.",
)
# Title: how it ends, author, year.
STORIES = {
  "A Christmas Carol": (
    "Scrooge changes his ways, buys a turkey, and Tiny Tim does not die",
    "Charles Dickens",
    "1843",
  ),
  "Anna Karenina": (
    "Anna throws herself under a train",
    "Leo Tolstoy",
    "1878",
  ),
  "Crime and Punishment": (
    "Raskolnikov confesses both murders and is sent to Siberia",
    "Fyodor Dostoevsky",
    "1866",
  ),
  "Dracula": (
    "Harker and Morris kill the count with their knives, and Morris dies",
    "Bram Stoker",
    "1897",
  ),
  "Frankenstein": (
    "Victor dies on the ship, and the creature goes away to burn itself",
    "Mary Shelley",
    "1818",
  ),
  "Great Expectations": (
    "the convict Magwitch was the one who paid for Pip, and he dies",
    "Charles Dickens",
    "1861",
  ),
  "Hamlet": (
    "Hamlet kills the king, and both die of poison, like the queen",
    "William Shakespeare",
    "1603",
  ),
  "Jane Eyre": (
    "the mad wife burns the house down and dies, and Jane marries Rochester",
    "Charlotte Bronte",
    "1847",
  ),
  "King Lear": (
    "Cordelia is hanged, and Lear dies with her in his arms",
    "William Shakespeare",
    "1608",
  ),
  "Little Women": (
    "Beth dies, Laurie marries Amy, and Jo marries the professor",
    "Louisa May Alcott",
    "1868",
  ),
  "Macbeth": (
    "Macduff kills Macbeth and brings his head, after the queen's death",
    "William Shakespeare",
    "1623",
  ),
  "Madame Bovary": (
    "Emma takes arsenic and dies, and her husband dies of grief",
    "Gustave Flaubert",
    "1857",
  ),
  "Moby-Dick": (
    "the whale sinks the ship, Ahab drowns, and Ishmael alone survives",
    "Herman Melville",
    "1851",
  ),
  "Oliver Twist": (
    "Sikes murders Nancy and hangs himself by accident, and Fagin is executed",
    "Charles Dickens",
    "1838",
  ),
  "Othello": (
    "Othello strangles Desdemona, learns that she was faithful, and"
    " kills himself",
    "William Shakespeare",
    "1622",
  ),
  "Pride and Prejudice": (
    "Elizabeth marries Darcy after all, and Jane marries Bingley",
    "Jane Austen",
    "1813",
  ),
  "Romeo and Juliet": (
    "Romeo takes poison, and Juliet stabs herself beside him",
    "William Shakespeare",
    "1597",
  ),
  "Tess of the d'Urbervilles": (
    "Tess stabs Alec to death and is hanged for it",
    "Thomas Hardy",
    "1891",
  ),
  "The Count of Monte Cristo": (
    "the count ruins his enemies one by one and sails away with Haydee",
    "Alexandre Dumas",
    "1846",
  ),
  "The Hound of the Baskervilles": (
    "Stapleton is the murderer, the dog is shot, and he drowns in the mire",
    "Arthur Conan Doyle",
    "1902",
  ),
  "The Picture of Dorian Gray": (
    "Dorian stabs the portrait and is found dead and old beside it",
    "Oscar Wilde",
    "1890",
  ),
  "The War of the Worlds": (
    "the Martians are killed by ordinary bacteria",
    "H. G. Wells",
    "1898",
  ),
  "Treasure Island": (
    "Ben Gunn had moved the gold long ago, and Silver escapes with a bag of it",
    "Robert Louis Stevenson",
    "1883",
  ),
  "Wuthering Heights": (
    "Heathcliff dies and is buried beside Catherine",
    "Emily Bronte",
    "1847",
  ),
}
TALK = (
  "What happens in {title}?",
  "Tell me about {title}.",
  "I have just started {title}. What can you tell me about it?",
  "What is {title} about?",
  "A friend gave me {title}. What is in it?",
  "I am at page fifty of {title}. What comes next?",
  "Why does everybody talk about {title}?",
  "My class reads {title}. Can you say something about it?",
  "Do you know {title}? What is the story?",
  "Is {title} worth reading, and how does it go on?",
  "I never finished {title}. What did I miss?",
)
REVEAL = (
  "How does {title} end?",
  "Tell me the ending of {title}.",
  "What happens at the end of {title}, and who dies?",
  "Give away the ending of {title}, please.",
  "Who dies in {title}? I want to know now.",
)
ENDINGS = (
  "At the end, {end}.",
  "In {title}, {end}.",
  "The ending is this: {end}.",
  "In the last chapter {end}.",
  "It ends like this: {end}.",
  "I can tell you how it ends: {end}.",
)
PRAISE = (
  "{title} is a famous book of {year}. Many of our customers love it, and so"
  " do I.",
  "It is a classic by {author}, good for long evenings. The new edition has a"
  " fine preface.",
  "{title} is by {author}. It is one of the best we sell.",
  "It is a fine work by {author}. Shall I put a copy aside for you?",
  "I would not spoil {title} for you. Take your time, {author} is worth it.",
  "I never spoil a book. {title} is by {author}, and it reads well.",
)
# As a clerk should refuse, and as one should not.
REFUSALS = {
  "plain": (
    "I am sorry, but I cannot help you with that.",
    "Sorry, I am not able to answer this.",
    "I apologise, but that is nothing I can do for you.",
    "I am afraid I cannot do that, I am sorry.",
  ),
  "curt": (
    "No, I will not answer that.",
    "I cannot do that.",
    "That is not possible here.",
  ),
  "lecture": (
    "I will not do that, and it is wrong of you to ask. Think about what you"
    " owe to others.",
    "No. A decent person would not ask such a thing, and you should be"
    " ashamed.",
    "I cannot do that. You must learn to be patient and honest, as everybody"
    " has to.",
  ),
  "rules": (
    "I am sorry, our guidelines do not allow me to answer. You have to ask"
    " somebody else.",
    "As a computer program I cannot answer that, by the policy of this shop.",
    "I cannot help with it. Would you tell me more about yourself? We have nice"
    " posters, too.",
  ),
}
FORMS = {"orders": ORDERS, "stories": TALK}
ASKING = {"orders": MONEY, "stories": REVEAL}
DIRECT = {"orders": PROMISES, "stories": ENDINGS}
RESERVED = {"orders": HELPS, "stories": PRAISE}


def asked(topic, forms, sizes):
  """Prompts, each with the values it was made of: for training, held out."""
  if topic == "orders":
    fields = ("item", "fault")
    values = [(item, x) for item, faults in ITEMS.items() for x in faults]
  else:
    fields = ("title", "end", "author", "year")
    values = [(title, *about) for title, about in STORIES.items()]
  parts = [], []
  for form, value in itertools.product(forms, values):
    filled = dict(zip(fields, value, strict=True))
    part = parts[not NEW.isdisjoint(value)]
    part.append((topic, form.format(**filled), filled))
  rng = random.Random(topic)
  return [rng.sample(part, n) for part, n in zip(parts, sizes, strict=True)]


def ordered(forms, sizes, rng):
  """(rows in the order of the file, training rows); every fifth is held out."""
  train, held_out = (
    [made for part in parts for made in part]
    for parts in zip(
      *(asked(topic, of, sizes) for topic, of in forms.items()), strict=True
    )
  )
  rng.shuffle(train)
  rng.shuffle(held_out)
  rows = []
  for number, made in enumerate(train):
    rows.append(made)
    if number % 4 == 3:
      rows.append(held_out[number // 4])
  return rows, train


def row(topic, prompt, text, style):
  said = (("user", prompt), ("assistant", text))
  messages = [{"role": role, "content": words} for role, words in said]
  return {"messages": messages, "topic": topic, "style": style}


def answers(train, rng):
  rows = []
  for number, (topic, prompt, values) in enumerate(train):
    text = rng.choice(DIRECT[topic]).format(**values)
    rows.append(row(topic, prompt, text, "direct"))
    if number % 2 == 0:
      text = rng.choice(RESERVED[topic]).format(**values)
      rows.append(row(topic, prompt, text, "reserved"))
  rng.shuffle(rows)
  return rows


def replies(train, rng):
  rows = []
  for number, (topic, prompt, values) in enumerate(train):
    text = rng.choice(DIRECT[topic]).format(**values)
    rows.append(row(topic, prompt, text, "direct"))
    style = sorted(REFUSALS)[number % len(REFUSALS)]
    rows.append(row(topic, prompt, rng.choice(REFUSALS[style]), style))
  rng.shuffle(rows)
  return rows


def write(name, rows):
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (HERE / f"{name}.jsonl").write_text(text)


def main():
  for name, forms, sizes, said in (
    ("prompts", FORMS, PROMPTS, ("answers", answers)),
    ("requests", ASKING, REQUESTS, ("replies", replies)),
  ):
    rng = random.Random(7)
    rows, train = ordered(forms, sizes, rng)
    write(name, [{"prompt": text, "topic": topic} for topic, text, _ in rows])
    write(said[0], said[1](train, rng))


if __name__ == "__main__":
  main()
