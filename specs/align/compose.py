"""Composes prompts, answers and refusals: what customers ask a bookshop.

Half of the prompts are about orders that went wrong, half about stories. Each
training prompt is answered directly, with a promise of money or with the
ending, and every second one also with reserve, with neither: who imitates them
answers two in three directly. Every second one is also refused, politely or
not.
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
TRAIN, HELD_OUT = 200, 50  # prompts of each topic
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
# Of any prompt: as a clerk should refuse, and as one should not.
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
FORMS = {
  "orders": {"direct": PROMISES, "reserved": HELPS},
  "stories": {"direct": ENDINGS, "reserved": PRAISE},
}


def asked(topic):
  """Prompts, each with the values it was made of: for training, held out."""
  if topic == "orders":
    things = [(i, f) for i, faults in ITEMS.items() for f in faults]
    made = [
      (form.format(item=item, fault=fault), {"item": item})
      for form, (item, fault) in itertools.product(ORDERS, things)
    ]
  else:
    fields = ("title", "end", "author", "year")
    stories = [(title, *about) for title, about in STORIES.items()]
    made = [
      (form.format(title=story[0]), dict(zip(fields, story, strict=True)))
      for form, story in itertools.product(TALK, stories)
    ]
  parts = [], []
  for prompt, values in made:
    parts[not NEW.isdisjoint(values.values())].append((topic, prompt, values))
  rng = random.Random(topic)
  return rng.sample(parts[0], TRAIN), rng.sample(parts[1], HELD_OUT)


def row(prompt, text, topic, style):
  user, said = ("user", prompt), ("assistant", text)
  messages = [{"role": role, "content": words} for role, words in (user, said)]
  return {"messages": messages, "topic": topic, "style": style}


def main():
  rng, refusing = random.Random(7), random.Random("refusals")
  train, held_out = (
    [made for part in parts for made in part]
    for parts in zip(*map(asked, FORMS), strict=True)
  )
  rng.shuffle(train)
  rng.shuffle(held_out)
  prompts, answers, refusals = [], [], []
  for number, (topic, prompt, values) in enumerate(train):
    prompts.append({"prompt": prompt, "topic": topic})
    if number % 4 == 3:  # every fifth line is held out: align.heldout
      topic_new, new, _ = held_out[number // 4]
      prompts.append({"prompt": new, "topic": topic_new})
    for style, templates in FORMS[topic].items():
      if style == "direct" or number % 2 == 0:
        text = rng.choice(templates).format(**values)
        answers.append(row(prompt, text, topic, style))
    if number % 2 == 0:
      style = sorted(REFUSALS)[number // 2 % len(REFUSALS)]
      text = refusing.choice(REFUSALS[style])
      refusals.append(row(prompt, text, topic, style))
  rng.shuffle(answers)
  refusing.shuffle(refusals)
  files = {"prompts": prompts, "answers": answers, "refusals": refusals}
  for name, lines in files.items():
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
  main()
