"""The mini edition of each task: texts written at call time by seeded grammars.

Small vocabulary, real structure: a review's verdict is carried by many different clauses, some of them conceded to the
other side; a concept set has several sentences that inflect and order its concepts in different ways; the summary of a
post states the facts that are scattered over it. The rows have the columns of the real data.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

SIZES = {"train": 6000, "validation": 500, "test": 500}

T = TypeVar("T")
Row = dict[str, Any]
_MIRROR = str.maketrans("+-", "-+")


class _Draw:
    """Choices made from `random.Random.random` alone, whose sequence Python keeps for a seed across versions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return sorted(options, key=lambda _: self.random())


class _Grammar:
    """Rules over words: a header line names a rule, the indented lines below it are its alternatives.

    ``{name}`` in an alternative stands for a rule. A rule whose name is in capitals is a fact: drawn once a text, the
    same wherever the text mentions it. ``±`` in a rule stands for ``+`` and ``∓`` for ``-``, and then the other way
    round: such a rule is written once and holds for both sentiments.
    """

    def __init__(self, source: str) -> None:
        self.rules: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for block in re.split(r"\n+(?=\S)", source.strip()):
            mirrored = (block.translate(str.maketrans("±∓", signs)) for signs in ("+-", "-+"))
            for text in mirrored if "±" in block else [block]:
                name, *alternatives = (line.strip() for line in text.splitlines())
                self.rules[name] = [
                    (re.sub(r"\{[^}]*\}", "%s", line), tuple(re.findall(r"\{([^}]*)\}", line))) for line in alternatives
                ]

    def write(self, draw: _Draw, name: str, facts: dict[str, str]) -> str:
        """Write one alternative of a rule; facts drawn on the way are added to `facts`."""
        if name in facts:
            return facts[name]
        template, names = draw.choice(self.rules[name])
        text = template % tuple([self.write(draw, part, facts) for part in names]) if names else template
        if name.isupper():
            facts[name] = text
        return text


def _paragraph(sentences: Sequence[str]) -> str:
    text = " ".join(sentences)
    return re.sub(r"(?:^|[.?] )[a-z]", lambda start: start[0].upper(), text)


# --- IMDB -------------------------------------------------------------------------------------------------------------

_LEADS = (
    ("Anna Reed", "her"), ("Clara Stone", "her"), ("Lucy Marsh", "her"), ("Nora Quinn", "her"),
    ("Tom Hale", "his"), ("Peter Lane", "his"), ("Victor Cole", "his"), ("Sam Carter", "his"),
)  # fmt: skip
_ASPECTS = (
    "acting", "story", "music", "dialogue", "ending", "pace", "camera", "humor",
    "people", "lead", "director", "compare", "audience", "viewer", "scenes",
)  # fmt: skip

_REVIEW = _Grammar("""
GENRE
  comedy
  thriller
  western
  musical
  drama
  mystery
  romance
  war film
  horror film
  spy film
DIRECTOR
  Brandt
  Keller
  Moreau
  Novak
  Ferris
  Tanaka
COMPANY
  my sister
  my brother
  my wife
  my best friend
  my parents
  my two friends
WHEN
  last night
  last week
  on a rainy evening
  on television
  at the local cinema
  at a small festival
  on a long flight
  many years ago
saw
  saw
  watched
film
  film
  movie
  picture
opening
  I {saw} this {GENRE} by {DIRECTOR} with {COMPANY} {WHEN}.
  {COMPANY} and I {saw} this {GENRE} with {LEAD} {WHEN}.
  {COMPANY} took me to see this {GENRE} by {DIRECTOR} {WHEN}.
  {COMPANY} told me about this {GENRE} with {LEAD}, so I {saw} it {WHEN}.
  I {saw} this {GENRE} by {DIRECTOR} {WHEN} because {COMPANY} wanted to see {LEAD}.
  {DIRECTOR} made this {GENRE} with {LEAD}, and I {saw} it {WHEN}.
  I am a fan of {LEAD}, so {COMPANY} and I {saw} this {GENRE} {WHEN}.
  I had never heard of this {GENRE} by {DIRECTOR} before {COMPANY} showed it to me {WHEN}.
  I did not know what to expect when {COMPANY} and I {saw} this {GENRE} by {DIRECTOR} {WHEN}.
plot
  {LEAD} plays {role} who {goal} {place}.
  it is about {role} who {goal} {place}.
  the story follows {role} who {goal} {place}.
  in this {GENRE} {LEAD} is {role} who {goal}.
role
  a young doctor
  a lonely farmer
  a retired policeman
  a tired teacher
  a famous singer
  a poor painter
  a shy clerk
  a clever thief
goal
  tries to save {his} family
  looks for {his} lost brother
  falls in love with a stranger
  wants to leave {his} old life behind
  has to hide from the police
  must find a missing child
  returns home after many years
  learns the truth about {his} father
place
  in a small town
  on a quiet island
  in the big city
  near the sea
  during a long winter
  in the desert
  on a night train
  in an empty hotel
SECOND_HALF
  the second half takes place {place}.
neutral
  the {film} runs for about two hours.
  it was shot in black and white.
  the story is taken from an old book.
  {SECOND_HALF}
  {DIRECTOR} also wrote the script.
  it was the first {film} that {LEAD} made with {DIRECTOR}.
  there are a few songs in the first half.
  {LEAD} also sings in one scene.
  it came out in the same year as another {GENRE} by {DIRECTOR}.
acting+
  the acting is warm and honest
  the acting feels real in every scene
  the actors are a joy to watch
  the whole cast works well together
  not one of the actors is weak
  the small roles are played with care
acting-
  the acting is cold and stiff
  the acting feels fake in every scene
  the actors are hard to watch
  the whole cast looks lost
  not one of the actors is good
  the small roles are played without care
story+
  the story is clever and easy to follow
  the story kept me guessing
  the plot is full of surprises
  the idea behind it is fresh
  the plot makes perfect sense
  the story has a big heart
story-
  the story is silly and hard to follow
  the story lost me after ten minutes
  the plot is full of holes
  the idea behind it is old
  the plot makes no sense
  the story has no heart
music+
  the music is beautiful
  the music fits every scene
  the songs are lovely
  the songs stayed in my head for days
music-
  the music is awful
  the music ruins every scene
  the songs are terrible
  the songs gave me a headache
dialogue+
  the dialogue is sharp and funny
  people talk the way real people do
  the script is smart
  every line sounds true
dialogue-
  the dialogue is flat and boring
  nobody talks the way real people do
  the script is a mess
  every line sounds false
ending+
  the ending is perfect
  the ending moved me to tears
  the last scene is worth the wait
  I did not see the great ending coming
ending-
  the ending is a letdown
  the ending made me angry
  the last scene is not worth the wait
  I saw the poor ending coming
pace+
  the pace is just right
  the time flew by
  there is not a dull moment in it
  it never feels too long
pace-
  the pace is far too slow
  the time did not seem to pass
  there are many dull moments in it
  it feels much too long
camera+
  the camera work is stunning
  every shot looks like a painting
  the sets look rich
  the light and the colors are wonderful
camera-
  the camera work is ugly
  every shot looks like a bad advert
  the sets look cheap
  the light and the colors are dreadful
humor+
  the jokes are really funny
  most of the jokes work
  it made me laugh out loud
  it is not hard to laugh at the jokes
humor-
  the jokes are not funny
  most of the jokes fail
  it did not make me laugh once
  it is hard to laugh at the jokes
people+
  the characters are easy to like
  I cared about every one of the characters
  the people in it feel alive
  the bad guys are scary
people-
  the characters are hard to like
  I did not care about any of the characters
  the people in it feel dead
  the bad guys are a joke
lead+
  {LEAD} is wonderful
  {LEAD} gives the best performance of {his} life
  nobody could play this part better than {LEAD}
  {LEAD} has never been so good
  {LEAD} is funny and sad in the same scene
lead-
  {LEAD} is dreadful
  {LEAD} gives the worst performance of {his} life
  anybody could play this part better than {LEAD}
  {LEAD} has never been so bad
  {LEAD} looks bored in every scene
director+
  {DIRECTOR} knows how to tell a story
  {DIRECTOR} does a great job
  {DIRECTOR} takes a risk and it works
  {DIRECTOR} has not lost his touch
director-
  {DIRECTOR} does not know how to tell a story
  {DIRECTOR} does a poor job
  {DIRECTOR} takes a risk and it fails
  {DIRECTOR} has lost his touch
compare+
  it is much better than the last {film} by {DIRECTOR}
  it is one of the best films of the year
  few films are as good as this one
  it is even better than the book
  other films of this kind look weak beside it
compare-
  it is much worse than the last {film} by {DIRECTOR}
  it is one of the worst films of the year
  few films are as bad as this one
  it is not half as good as the book
  other films of this kind look great beside it
audience+
  {COMPANY} loved it
  the audience clapped at the end
  {COMPANY} laughed and cried
  nobody in the audience left early
audience-
  {COMPANY} hated it
  the audience was asleep at the end
  {COMPANY} fell asleep
  half of the audience left early
viewer+
  I enjoyed every minute
  I was never bored
  I forgot about the time
  I could not stop smiling
  I was glad that I came
viewer-
  I suffered every minute
  I was often bored
  I kept looking at my watch
  I could not stop yawning
  I was sorry that I came
scenes+
  the opening scene is brilliant
  there is one scene that I will never forget
  the love scenes are sweet
  the action scenes are exciting
scenes-
  the opening scene is a disaster
  there is not one scene that I will remember
  the love scenes are painful
  the action scenes are tiring
single±
  {one±}.
  {one±}.
  I have to say that {one±}.
  the truth is that {one±}.
  {top±}, {one±}.
  it has to be said that {one±}.
top+
  best of all
  to my surprise
  luckily
top-
  worst of all
  to make things worse
  sadly
pair±
  {one±}, and {two±}.
  {one±} and {two±}.
  {one±}, and {top±}, {two±}.
mixed±
  although {two∓}, {one±}.
  {two∓}, but {one±}.
  even if {two∓}, {one±}.
  {one±}, even though {two∓}.
  {two∓}, and yet {one±}.
turn+
  but after an hour it gets better, because {one+}.
  still, the second half saves it, because {one+}.
  and yet I was happy with it, because {one+}.
turn-
  but after an hour it gets worse, because {one-}.
  still, the second half ruins it, because {one-}.
  and yet I was not happy with it, because {one-}.
verdict+
  I would gladly watch it again.
  do not miss it.
  I give it {high} out of ten.
  I will watch it again with {COMPANY}.
  it is worth your time and money.
  in the end I loved this {film}.
  in short, this {GENRE} is a great {film}.
  {COMPANY} should see it too.
  this {film} deserves more praise.
verdict-
  I would never watch it again.
  stay away from it.
  I give it {low} out of ten.
  do not go and see it.
  it is a waste of time and money.
  in the end I hated this {film}.
  in short, this {GENRE} is a bad {film}.
  {COMPANY} should skip it.
  this {film} deserves no praise.
high
  eight
  nine
  ten
low
  one
  two
  three
""")


def _begin_review(draw: _Draw) -> tuple[str, dict[str, str]]:
    lead, his = draw.choice(_LEADS)
    facts = {"LEAD": lead, "his": his}
    return _REVIEW.write(draw, "opening", facts), facts


def _finish_review(draw: _Draw, opening: str, facts: dict[str, str]) -> Row:
    label = int(draw.random() < 0.5)
    side, other = "+-" if label else "-+"
    # How much of a review speaks for its verdict: nearly all of a plain one, a little more than half of a mixed one,
    # only the end of a turning one. So the first half of a review leaves its second half open.
    mood = draw.choice(("plain", "plain", "plain", "mixed", "turning"))
    length = 5 + int(draw.random() * 3)
    turn = length // 2 if mood == "turning" else 0
    aspects = iter(draw.shuffled(_ASPECTS))

    sentences = [opening]
    if draw.random() < 0.4:
        sentences.append(_REVIEW.write(draw, "plot", facts))
    for position in range(length):
        agrees = draw.random() < (0.6 if mood == "mixed" else 0.9)
        if position == turn > 0:
            form, sign = "turn", side
        elif draw.random() < 0.2:
            form, sign = "neutral", ""
        else:
            form = draw.choice(("single", "single", "pair", "mixed"))
            sign = side if agrees == (position >= turn) else other
        if sign:
            facts["one" + sign] = _REVIEW.write(draw, next(aspects) + sign, facts)
            sign_of_two = sign.translate(_MIRROR) if form == "mixed" else sign
            facts["two" + sign_of_two] = _REVIEW.write(draw, next(aspects) + sign_of_two, facts)
        sentence = _REVIEW.write(draw, form + sign, facts)
        if sentence not in sentences:
            sentences.append(sentence)
    if draw.random() < 0.9:
        sentences.append(_REVIEW.write(draw, "verdict" + side, facts))
    return {"text": _paragraph(sentences), "label": label}


# --- CommonGen --------------------------------------------------------------------------------------------------------

_PREPOSITIONS = {
    "in the": "park garden yard forest snow kitchen bedroom garage office library shop gym barn",
    "on the": "field beach street farm stage",
    "by the": "river lake pool road",
    "at the": "school market station table",
}
_PLACES = {place: f"{words} {place}" for words, places in _PREPOSITIONS.items() for place in places.split()}
_PLURALS = {"man": "men", "woman": "women", "child": "children", "bus": "buses", "box": "boxes", "dish": "dishes",
            "bush": "bushes", "leaf": "leaves", "pony": "ponies"}  # fmt: skip
_MASS = {"bread", "rice", "soup", "food", "fruit", "meat", "cake", "coffee", "tea", "water", "milk", "luggage"}
_PEOPLE = "man woman boy girl"
_COMPANIONS = ["friend", "child", "teacher", "neighbor", "man", "woman", "boy", "girl"]
# Forms of the verb | who | what | where | the word that joins a companion. All verbs are regular, so that a concept
# shares its stem with each of its forms.
_FRAMES = [
    [field.split() for field in line.split("|")]
    for line in f"""
kick kicks kicking kicked | {_PEOPLE} player | ball box can | park yard field beach street | to
roll rolls rolling rolled | {_PEOPLE} worker | ball barrel tire | yard street road garage | to
carry carries carrying carried | {_PEOPLE} worker farmer | bag box basket chair | street road market station | for
push pushes pushing pushed | {_PEOPLE} worker farmer | cart car bike | street road park market garage | with
pull pulls pulling pulled | {_PEOPLE} horse farmer | cart rope sled wagon | snow field road farm | with
wash washes washing washed | {_PEOPLE} worker | car dish window truck | yard kitchen street garage farm | with
paint paints painting painted | {_PEOPLE} artist | wall fence picture boat door | garden street beach school | with
cook cooks cooking cooked | {_PEOPLE} chef | meat rice soup food | kitchen beach market school | for
bake bakes baking baked | {_PEOPLE} chef baker | bread cake pie cookie | kitchen shop school market | for
play plays playing played | {_PEOPLE} artist | guitar drum piano violin | stage park street school | for
watch watches watching watched | {_PEOPLE} student | game movie bird show | park field school beach | with
chase chases chasing chased | {_PEOPLE} cat | ball bird chicken rabbit | park yard field farm garden | with
pick picks picking picked | {_PEOPLE} farmer | flower apple fruit leaf | garden field farm forest | with
plant plants planting planted | {_PEOPLE} farmer | tree flower seed bush | garden yard field park | with
clean cleans cleaning cleaned | {_PEOPLE} worker | window floor shoe lamp | kitchen school shop garage | with
serve serves serving served | {_PEOPLE} waiter chef | food coffee soup cake | table kitchen beach pool | to
repair repairs repairing repaired | {_PEOPLE} worker farmer | bike car roof fence engine | garage street barn | with
lift lifts lifting lifted | {_PEOPLE} worker athlete | weight box bar stone | gym garage field yard | with
pour pours pouring poured | {_PEOPLE} waiter chef | water tea coffee milk | table kitchen garden office | for
climb climbs climbing climbed | {_PEOPLE} hiker | tree wall ladder rock | forest park garden lake | with
pack packs packing packed | {_PEOPLE} worker student | bag box suitcase luggage | bedroom shop station office | for
load loads loading loaded | {_PEOPLE} worker farmer | truck wagon boat van | street road farm station river | with
cross crosses crossing crossed | {_PEOPLE} horse hiker | bridge road stream | forest snow park farm | with
brush brushes brushing brushed | {_PEOPLE} farmer | horse cat pony coat | barn farm garden bedroom | with
open opens opening opened | {_PEOPLE} student | letter book box gift | bedroom library office table | for
move moves moving moved | {_PEOPLE} worker student | chair desk sofa plant | office library school bedroom | for
collect collects collecting collected | {_PEOPLE} student child | shell stone leaf can | beach forest river park | with
pass passes passing passed | {_PEOPLE} player student | ball note book bag | field school library park | to
""".strip().splitlines()
]
_BYSTANDING = {
    verb: (f"{verb}s", f"is {stem}ing", f"{stem}ed")
    for verb, stem in (pair.split() for pair in ("wait wait", "smile smil", "laugh laugh", "rest rest", "help help"))
}
# Which parts of a scene are the concepts: who, verb, what, where, companion, what the companion does.
_CONCEPT_PARTS = ["AVO", "AVO", "VOL", "AVL", "AVOL", "AVOL", "AVOB", "AVBL", "AVOLB", "AVOBW"]


def _begin_scene(draw: _Draw) -> tuple[str, dict[str, Any]]:
    frame = draw.choice(_FRAMES)
    scene = _complete(draw, frame, {})
    concepts = {part: scene[part] for part in draw.choice(_CONCEPT_PARTS)}
    return " ".join(sorted(concepts.values())), {"frame": frame, "concepts": concepts}


def _finish_scene(draw: _Draw, key: str, scene: dict[str, Any]) -> Row:
    count = 3 + int(draw.random() * 3)
    targets = dict.fromkeys(_sentence(draw, **scene) for _ in range(count))  # no sentence twice, in order
    return {"concepts": draw.shuffled(tuple(scene["concepts"].values())), "targets": list(targets)}


def _complete(draw: _Draw, frame: list[list[str]], concepts: dict[str, str]) -> dict[str, str]:
    """Choose the parts of a scene that its concepts leave open."""
    (verb, *_), agents, things, places, _ = frame
    agent = concepts.get("A") or draw.choice([agent for agent in agents if agent != concepts.get("B")])
    companion = draw.choice([companion for companion in _COMPANIONS if companion != agent])
    scene = {"A": agent, "V": verb, "O": draw.choice(things), "L": draw.choice(places), "B": companion}
    return scene | {"W": draw.choice(tuple(_BYSTANDING))} | concepts


def _noun(draw: _Draw, noun: str, several: bool = False) -> str:
    """A noun with an article or a number."""
    if noun in _MASS:
        return draw.choice(("some ", "the ")) + noun
    if several:
        return draw.choice(("two ", "some ", "the ")) + _PLURALS.get(noun, noun + "s")
    return draw.choice(("the ", "an " if noun[0] in "aeiou" else "a ")) + noun


def _sentence(draw: _Draw, frame: list[list[str]], concepts: dict[str, str]) -> str:
    """Write a sentence that shows all concepts of a scene, and sometimes more of it."""
    scene = _complete(draw, frame, concepts)
    (verb, verbs, verbing, verbed), joint = frame[0], frame[4][0]
    tense = int(draw.random() * 3)  # present, progressive, past

    agents, things = draw.random() < 0.25, draw.random() < 0.25 and scene["O"] not in _MASS
    who, what = _noun(draw, scene["A"], agents), _noun(draw, scene["O"], things)
    where = _PLACES[scene["L"]] if "L" in concepts or draw.random() < 0.3 else ""
    companion = meanwhile = ""
    if "W" in concepts:
        meanwhile = f"{_noun(draw, scene['B'])} {_BYSTANDING[scene['W']][tense]}"
    elif "B" in concepts or draw.random() < 0.15:
        companion = f"{joint} {_noun(draw, scene['B'])}"
        if joint == "with" and draw.random() < 0.4:
            who, agents, companion = f"{who} and {companion.removeprefix('with ')}", True, ""
    be = "are" if agents else "is"
    does = (verb if agents else verbs, f"{be} {verbing}", verbed)[tense]

    form = draw.random()
    if form < 0.15 and not companion:
        be = "are" if things else "is"
        done = (f"{be} {verbed}", f"{be} being {verbed}", f"{'were' if things else 'was'} {verbed}")[tense]
        words = [what, done, "by", who, where]
    elif form < 0.3 and not meanwhile and not who.startswith("the "):
        words = ["there", be, who, verbing, what, companion, where]
    elif form < 0.5 and where:
        words = [where + ",", who, does, what, companion]
    elif form < 0.65 and where:
        words = [who, where, does, what, companion]
    else:
        words = [who, does, what, companion, where]
    if meanwhile and form < 0.75:
        words += [draw.choice(("while", "as")), meanwhile]
    elif meanwhile:
        words = [meanwhile, draw.choice(("while", "as")), *words]
    text = " ".join([word for word in words if word])
    return text[0].upper() + text[1:] + "."


# --- TL;DR ------------------------------------------------------------------------------------------------------------

_PEOPLE_WE_KNOW = tuple(
    (who, *pronouns.split())
    for pronouns, people in (
        ("she her her", ("my sister", "my aunt", "my stepsister", "my mother", "my niece", "my grandmother")),
        ("he him his", ("my brother", "my uncle", "my stepbrother", "my father", "my nephew", "my grandfather")),
        ("she her her", ("my roommate", "my best friend", "my neighbor", "my cousin")),
        ("he him his", ("my roommate", "my best friend", "my neighbor", "my cousin")),
    )
    for who in people
)

_POST = _Grammar("""
topic
  borrow
  move
  party
  pet
  money
  noise
  secret
  gift
  shop
  lost
  trip
WHEN
  last week
  last month
  two days ago
  on Friday
  over the weekend
  last night
  this morning
SOON
  next week
  next month
  on Saturday
  in two weeks
start
  sorry for the long post.
  this is a throwaway account.
  I am writing this on my phone.
  I never thought that I would post here.
  I hope this is the right place to ask.
  I am not sure where to begin.
filler
  I am {age} and I live alone.
  we have always been close.
  we do not see each other often.
  we used to fight a lot, but it got better.
  {THIRD} knows all about it.
  I had just come home from work.
  it was raining that day.
  I do not have much money right now.
  I had a long day and I was tired.
  {THIRD} is on vacation right now.
  {he} has a good heart and works hard.
  I was making dinner when I heard about it.
  I have never been good at this kind of thing.
  {THIRD} had the same problem last year.
age
  nineteen
  twenty
  thirty
  forty
advice
  {THIRD} told me to {BAD_IDEA}, but I disagree.
  {THIRD} would {BAD_IDEA}.
  {THIRD} thinks that I am too nice.
  a friend said that I should {BAD_IDEA}.
  at first I wanted to {BAD_IDEA}.
question
  should I {ASK}?
  I do not know if I should {ASK}.
  do you think that I should {ASK}?
  would it be wrong to {ASK}?
  now I want to {ASK}. is that a good idea?
thanks
  thank you for reading.
  any help is welcome.
  please be honest with me.
  I will post an update later.
wonder
  should I {ASK}?
  I wonder if I should {ASK}.
  is it wrong to {ASK}?

borrow.subreddit
  relationships
  AskReddit
  personalfinance
THING
  car
  bike
  camera
  laptop
  tent
  guitar
  jacket
DAMAGE
  broke it
  lost it
  sold it
  left it out in the rain
  lent it to a stranger
EXCUSE
  refuses to pay
  says it was an accident
  will not talk to me
  says it was old anyway
  thinks it is funny
borrow.ask
  make {him} pay for it
  forgive {him}
  buy a new one
  call the police
  stop talking to {him}
borrow.facts
  {THING} {WHEN} {DAMAGE} {EXCUSE}
borrow.title
  {WHO} borrowed my {THING}
  {WHO} {DAMAGE}, and it was my {THING}
  Should I {ASK} after what {he} did to my {THING}?
  I will never lend my {THING} again
borrow.1
  {WHO} borrowed my {THING} {WHEN}.
  {WHEN} I let {WHO} use my {THING}. {He} borrowed it for a day.
  I own a nice {THING}, and {WHEN} {WHO} borrowed it.
borrow.2
  {he} {DAMAGE}.
  when I asked for it, I found out that {he} {DAMAGE}.
  today {he} told me that {he} {DAMAGE}.
borrow.3
  {he} {EXCUSE}.
  I was very angry, but {he} {EXCUSE}.
borrow.tldr
  {WHO} borrowed my {THING} {WHEN} and {DAMAGE}. {He} {EXCUSE}. {wonder}
  {WHEN} {WHO} borrowed my {THING} and {DAMAGE}, and {he} {EXCUSE}. {wonder}

move.subreddit
  relationships
  AskReddit
  legaladvice
REASON
  lost {his} job
  broke up with {his} partner
  cannot pay {his} rent
  had a fight with {his} landlord
  is starting school in my city
HOME
  house
  studio
  small apartment
  new apartment
TROUBLE
  my lease does not allow guests
  {he} never cleans
  {he} has two dogs
  {he} smokes inside
  I need to be alone
move.ask
  say no
  let {him} stay for a month
  ask {him} for rent
  talk to my landlord first
  help {him} find a hotel
move.facts
  {REASON} {HOME} {TROUBLE}
move.title
  {WHO} wants to move into my {HOME}
  {WHO} {REASON} and needs a place to stay
  Should I {ASK}?
  I do not want to share my {HOME}
move.1
  {WHO} {REASON}.
  I found out that {WHO} {REASON}.
move.2
  now {he} wants to move into my {HOME}.
  {he} asked me if {he} can move in. I live in a {HOME}, and {he} wants to come soon.
move.3
  the problem is that {TROUBLE}.
  I would like to help, but {TROUBLE}.
move.tldr
  {WHO} {REASON} and wants to move into my {HOME}, but {TROUBLE}. {wonder}
  {WHO} wants to move into my {HOME} because {he} {REASON}, but {TROUBLE}. {wonder}

party.subreddit
  relationships
  AskReddit
  weddings
EVENT
  wedding
  birthday party
  graduation
  dinner
VENUE
  in another city
  at the lake
  on a boat
  in the mountains
CONFLICT
  my ex will be there
  I have an exam on the same day
  I cannot pay for the trip
  I have to work that day
  {he} did not invite my partner
party.ask
  skip it
  go anyway
  say that I am sick
  tell {him} the truth
  send a gift and stay home
party.facts
  {EVENT} {VENUE} {SOON} {CONFLICT}
party.title
  {WHO} invited me to a {EVENT}
  I do not want to go to a {EVENT} {VENUE}
  Should I {ASK}?
  A {EVENT} {SOON}, and {CONFLICT}
party.1
  {WHO} invited me to a {EVENT} {VENUE}.
  there will be a {EVENT} {VENUE}, and {WHO} invited me.
party.2
  it is {SOON}.
  {he} wants everyone to be there {SOON}.
party.3
  the problem is that {CONFLICT}.
  I was happy at first, but {CONFLICT}.
  I want to be there for {him}, but {CONFLICT}.
party.tldr
  {WHO} invited me to a {EVENT} {VENUE} {SOON}, but {CONFLICT}. {wonder}
  I am invited to a {EVENT} {VENUE} {SOON} by {WHO}, but {CONFLICT}. {wonder}

pet.subreddit
  pets
  AskReddit
  AskVet
PET
  dog
  cat
  rabbit
  parrot
MEAL
  a bar of chocolate
  a sock
  some grapes
  a battery
  an onion
SIGN
  will not eat
  keeps shaking
  sleeps all day
  seems fine
  cannot walk straight
pet.ask
  take it to the vet
  wait until tomorrow
  give it more water
  ask {him} to pay for the vet
  put it on a diet
pet.facts
  {PET} {MEAL} {WHEN} {SIGN}
pet.title
  My {PET} ate {MEAL}
  {WHO} did not watch my {PET}
  My {PET} {SIGN}, should I {ASK}?
  Is {MEAL} bad for a {PET}?
pet.1
  {WHEN} {WHO} was watching my {PET}.
  I have a {PET}, and {WHO} was watching it {WHEN}.
pet.2
  it ate {MEAL}.
  {he} told me that it ate {MEAL}.
  when I came back, {he} said that it ate {MEAL}.
pet.3
  now it {SIGN}.
  I was not worried at first, but now it {SIGN}.
pet.tldr
  My {PET} ate {MEAL} {WHEN} while {WHO} was watching it, and now it {SIGN}. {wonder}
  {WHO} was watching my {PET} {WHEN} and it ate {MEAL}. now it {SIGN}. {wonder}

money.subreddit
  personalfinance
  relationships
  AskReddit
AMOUNT
  fifty
  two hundred
  five hundred
  one thousand
DEBT
  rent
  concert tickets
  a plane ticket
  a phone bill
  a couch
DODGE
  just bought a new car
  says that {he} forgot
  keeps changing the subject
  went on a vacation instead
  says that {he} will pay next year
money.ask
  ask for it again
  forget about it
  take {him} to court
  tell {his} parents
  take {his} bike
money.facts
  {AMOUNT} {DEBT} {WHEN} {DODGE}
money.title
  {WHO} owes me {AMOUNT} dollars
  {WHO} will not pay me for {DEBT}
  Should I {ASK}?
  I lent {AMOUNT} dollars to {WHO}
money.1
  {WHO} owes me {AMOUNT} dollars.
  I lent {AMOUNT} dollars to {WHO}, and {he} still owes me the money.
money.2
  it was for {DEBT} {WHEN}.
  {WHEN} I paid for {DEBT}, and half of it was for {him}.
money.3
  I asked for it, but {he} {DODGE}.
  {he} {DODGE}.
  now I see that {he} {DODGE}.
money.tldr
  {WHO} owes me {AMOUNT} dollars for {DEBT} but {DODGE}. {wonder}
  {WHEN} I paid for {DEBT} and {WHO} owes me {AMOUNT} dollars, but {he} {DODGE}. {wonder}

noise.subreddit
  AskReddit
  legaladvice
  relationships
SOUND
  plays the drums
  plays loud music
  plays the trumpet
  sings in the shower
  shouts at the television
HOURS
  every night
  at six in the morning
  until two in the morning
  all weekend
COST
  cannot sleep
  failed an exam
  was late for work
  have a headache all day
REPLY
  told me to buy earplugs
  laughed at me
  got angry
  did not open the door
noise.ask
  call the police
  write a letter
  move out
  talk to {him} again
  play my own music
noise.facts
  {SOUND} {HOURS} {COST} {REPLY}
noise.title
  {WHO} {SOUND} {HOURS}
  I {COST} because of {WHO}
  Should I {ASK}?
  How do I stop the noise {HOURS}?
noise.1
  {WHO} lives next to me and {SOUND} {HOURS}.
  I live with {WHO}, who {SOUND} {HOURS}.
noise.2
  I {COST} because of it.
  it is so loud that I {COST}.
noise.3
  I asked {him} to stop, and {he} {REPLY}.
  when I said something, {he} {REPLY}.
noise.tldr
  {WHO} {SOUND} {HOURS} and I {COST}. I asked {him} to stop and {he} {REPLY}. {wonder}
  I {COST} because {WHO} {SOUND} {HOURS}, and {he} {REPLY} when I asked {him} to stop. {wonder}

secret.subreddit
  relationships
  AskReddit
  offmychest
SECRET
  crashed the family car
  lost all {his} savings
  got married
  is moving abroad
  quit {his} job
  is seeing my ex
SUSPICION
  keeps asking me about it
  knows that something is wrong
  will find out soon
  would be very upset
secret.ask
  keep the secret
  tell {OTHER}
  ask {him} to be honest
  say that I know nothing
secret.facts
  {SECRET} {OTHER} {SUSPICION}
secret.title
  {WHO} {SECRET}
  I have to lie to {OTHER}
  Should I {ASK}?
  {WHO} told me a secret
secret.1
  {WHO} {SECRET}.
  I found out that {WHO} {SECRET}.
  I heard it from {him} first: {WHO} {SECRET}.
secret.2
  {he} asked me not to tell {OTHER}.
  nobody else knows, and {he} asked me not to tell {OTHER}.
secret.3
  {OTHER} {SUSPICION}.
  I feel bad, because {OTHER} {SUSPICION}.
secret.tldr
  {WHO} {SECRET} and asked me not to tell {OTHER}, who {SUSPICION}. {wonder}
  {WHO} {SECRET}. {OTHER} {SUSPICION}, but {he} asked me not to tell. {wonder}

gift.subreddit
  relationships
  AskReddit
  gifts
GIFT
  a ring
  an old painting
  a piano
  a red sweater
  a watch
OCCASION
  my birthday
  my graduation
  Christmas
  my new job
CATCH
  I do not like it
  I already have one
  I lost it
  it is too expensive
  {he} wants it back
gift.ask
  give it back
  sell it
  tell {him} the truth
  keep it and smile
  buy {him} the same thing
gift.facts
  {GIFT} {OCCASION} {WHEN} {CATCH}
gift.title
  {WHO} gave me {GIFT}
  I got {GIFT} for {OCCASION}
  Should I {ASK}?
  The gift from {WHO} is a problem
gift.1
  {WHEN} {WHO} gave me {GIFT}.
  {WHO} gave me {GIFT} {WHEN}.
gift.2
  it was for {OCCASION}.
  {he} said that it was for {OCCASION}.
gift.3
  the problem is that {CATCH}.
  I said thank you, but {CATCH}.
gift.tldr
  {WHO} gave me {GIFT} for {OCCASION}, but {CATCH}. {wonder}
  {WHEN} {WHO} gave me {GIFT} for {OCCASION}. the problem is that {CATCH}. {wonder}

shop.subreddit
  smallbusiness
  legaladvice
  AskReddit
SHOP
  bakery
  food truck
  bike shop
  flower shop
  coffee shop
FAULT
  takes money from the shop
  never comes on time
  is rude to the customers
  wants to close it
  hired {his} lazy friends
RESULT
  are losing customers
  owe the bank money
  fight every day
  may have to close
shop.ask
  sell my half
  buy {his} half
  talk to a lawyer
  give {him} one more chance
  quit
shop.facts
  {SHOP} {FAULT} {RESULT}
shop.title
  {WHO} and I run a {SHOP}
  {WHO} {FAULT}
  Should I {ASK}?
  My {SHOP} is in trouble
shop.1
  {WHO} and I run a {SHOP}.
  I run a small {SHOP} with {WHO}.
shop.2
  {he} {FAULT}.
  things went well at first, but {he} {FAULT}.
shop.3
  now we {RESULT}.
  because of this we {RESULT}.
shop.tldr
  I run a {SHOP} with {WHO}, but {he} {FAULT} and now we {RESULT}. {wonder}
  {WHO} and I run a {SHOP}. {He} {FAULT} and we {RESULT}. {wonder}

lost.subreddit
  relationships
  AskReddit
  confession
MISHAP
  lost
  broke
  damaged
ITEM
  ring
  watch
  camera
  favorite mug
  old bike
SPOT
  at the beach
  at a party
  at the gym
  at work
KNOWS
  does not know yet
  is looking for it
  got it from {his} mother
  needs it tomorrow
  thinks that it was stolen
lost.ask
  tell {him} the truth
  buy a new one
  say nothing
  say that it was stolen
lost.facts
  {MISHAP} {ITEM} {SPOT} {WHEN} {KNOWS}
lost.title
  I {MISHAP} the {ITEM} of {WHO}
  I did something bad {SPOT}
  Should I {ASK}?
  {WHO} {KNOWS}
lost.1
  {WHEN} I {MISHAP} the {ITEM} of {WHO}.
  I had the {ITEM} of {WHO} with me, and {WHEN} I {MISHAP} it.
lost.2
  it happened {SPOT}.
  I was {SPOT} when it happened.
lost.3
  {he} {KNOWS}.
  I feel bad because {he} {KNOWS}.
lost.tldr
  I {MISHAP} the {ITEM} of {WHO} {SPOT}, and {he} {KNOWS}. {wonder}
  {WHEN} I {MISHAP} the {ITEM} of {WHO} {SPOT}. {He} {KNOWS}. {wonder}

trip.subreddit
  travel
  relationships
  AskReddit
COUNTRY
  Spain
  Japan
  Mexico
  Canada
  Italy
CAUSE
  got a new job
  is afraid of flying
  met someone new
  spent all {his} money
  hurt {his} leg
PAID
  paid for the hotel
  bought the tickets
  took two weeks off
  packed my bags
trip.ask
  go alone
  ask {him} for money
  take {OTHER}
  stay home too
trip.facts
  {COUNTRY} {CAUSE} {PAID} {WHEN}
trip.title
  {WHO} cancelled our trip to {COUNTRY}
  No trip to {COUNTRY} because {WHO} {CAUSE}
  Should I {ASK}?
  I {PAID} and now there is no trip
trip.1
  {WHO} and I wanted to go to {COUNTRY}, but {WHEN} {he} cancelled our trip.
  {WHEN} {WHO} cancelled our trip to {COUNTRY}.
trip.2
  it is because {he} {CAUSE}.
  {he} says that {he} cannot go because {he} {CAUSE}.
trip.3
  I already {PAID}.
  the worst part is that I already {PAID}.
trip.tldr
  {WHO} cancelled our trip to {COUNTRY} because {he} {CAUSE}, but I already {PAID}. {wonder}
  I already {PAID} for our trip to {COUNTRY}, but {WHO} cancelled because {he} {CAUSE}. {wonder}
""")


def _begin_post(draw: _Draw) -> tuple[str, dict[str, str]]:
    who, he, him, his = draw.choice(_PEOPLE_WE_KNOW)
    # Bystanders of the other gender, so that it stays clear whom a pronoun means.
    other, third, *_ = draw.shuffled([person[0] for person in _PEOPLE_WE_KNOW if person[1] != he and person[0] != who])
    facts = {"WHO": who, "he": he, "He": he.capitalize(), "him": him, "his": his, "OTHER": other, "THIRD": third}
    topic = facts["topic"] = _POST.write(draw, "topic", facts)
    facts["ASK"] = _POST.write(draw, topic + ".ask", facts)
    return " ".join([topic, who, facts["ASK"], _POST.write(draw, topic + ".facts", facts)]), facts


def _finish_post(draw: _Draw, key: str, facts: dict[str, str]) -> Row:
    def write(name: str) -> str:
        return _POST.write(draw, name, facts)

    topic = facts["topic"]
    while (bad_idea := write(topic + ".ask")) == facts["ASK"]:
        pass
    facts["BAD_IDEA"] = bad_idea
    sentences = [write("start")] if draw.random() < 0.6 else []
    for part in ("1", "2", "3"):
        sentences.append(write(f"{topic}.{part}"))
        if draw.random() < 0.6 and (filler := write("filler")) not in sentences:
            sentences.append(filler)
    if draw.random() < 0.6:
        sentences.append(write("advice"))
    sentences.append(write("question"))
    if draw.random() < 0.5:
        sentences.append(write("thanks"))
    return {
        "subreddit": write(topic + ".subreddit"),
        "title": _paragraph([write(topic + ".title")]),
        "post": _paragraph(sentences),
        "summary": _paragraph([write(topic + ".tldr")]),
    }


# --- the splits -------------------------------------------------------------------------------------------------------

_WRITERS: dict[str, tuple[Callable[[_Draw], tuple[str, Any]], Callable[[_Draw, str, Any], Row]]] = {
    "imdb": (_begin_review, _finish_review),
    "commongen": (_begin_scene, _finish_scene),
    "tldr": (_begin_post, _finish_post),
}


def _split_of(key: str) -> str:
    percent = zlib.crc32(key.encode()) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "test"


def mini_rows(task_name: str, split: str) -> list[Row]:
    """Write one split of a task's mini edition.

    The key of a sample (the opening sentence of a review, the concepts of a set, the facts of a post) can be read from
    its prompt, and a hash of the key decides the split: no prompt can stand in two splits.

    Args:
        task_name: "imdb", "commongen" or "tldr".
        split: "train", "validation" or "test".

    Returns:
        `SIZES[split]` rows, the same in every process and on every Python, with the columns of the real data: text and
        label; concepts and targets; subreddit, title, post and summary.

    Raises:
        ValueError: An unknown task or split.
    """
    if task_name not in _WRITERS:
        raise ValueError(f"task_name must be one of {sorted(_WRITERS)}, got {task_name!r}")
    if split not in SIZES:
        raise ValueError(f"split must be one of {list(SIZES)}, got {split!r}")
    begin, finish = _WRITERS[task_name]
    draw = _Draw(zlib.crc32(f"{task_name} {split}".encode()))
    keys: set[str] = set()
    rows: list[Row] = []
    while len(rows) < SIZES[split]:
        key, plan = begin(draw)
        if key not in keys and _split_of(key) == split:
            keys.add(key)
            rows.append(finish(draw, key, plan))
    return rows
