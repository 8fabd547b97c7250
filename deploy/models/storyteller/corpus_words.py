"""The word lists of the storyteller's grammar, and nothing else.

The lists are long on purpose: a story that draws its hero, places and objects from them can only be
continued by reading the context, which is what makes the model a witness for a correct KV cache.
"""


def _words(text: str) -> tuple[str, ...]:
    """Split at commas, so that a list reads like a sentence and an entry may hold a space."""
    return tuple(" ".join(entry.split()) for entry in text.split(",") if entry.strip())


SHE_NAMES = _words(
    """Dora, Mila, Ana, Lily, Rosa, Nina, Ivy, Tess, Wren, Hazel, Maya, Clara, Luna, Poppy, Greta, Ella,
    Zoe, Freya, Olive, Ruby, Daisy, Fern, Willa, Nora, Sadie, Bella, Cora, Elsa, Juno, Kira, Lena,
    Mabel, Opal, Petra, Stella, Tilda, Una, Vera, Yara, Amy, Lucy, Emma, Sara, Molly, Hana, Mina, Ada,
    Ines, Lola, Pearl, Rita, Sophie, Alice, Anna, Grace, Maria, Betty, Nell, Dot, Honey"""
)
HE_NAMES = _words(
    """Pip, Otto, Max, Finn, Leo, Sam, Tom, Ben, Hugo, Oscar, Milo, Bruno, Felix, Jasper, Gus, Theo,
    Rufus, Barnaby, Kip, Toby, Ned, Ollie, Percy, Remy, Silas, Tad, Umar, Victor, Wes, Yuri, Zack,
    Alfie, Basil, Caleb, Dusty, Emil, Fritz, George, Henry, Ivan, Jack, Karl, Luke, Marco, Noah, Omar,
    Paco, Ravi, Scout, Timmy, Bob, Dan, Arlo, Monty, Boris, Rollo, Tuck, Bert, Peter, Charlie"""
)
NAME_STARTS = _words(
    """B, D, F, G, H, J, K, L, M, N, P, R, S, T, V, W, Z, Br, Dr, Fl, Gr, Kr, Pl, Tr, Sn, Sh"""
)
NAME_MIDDLES = _words(
    """ab, al, am, an, ar, eb, el, em, en, er, ib, il, im, in, ob, ol, om, on, or, ub, ul, um"""
)
SHE_ENDINGS = _words("a, ia, ina, elle, y, ie, ra, na, la, etta, issa, ora")
HE_ENDINGS = _words("o, us, in, ik, ert, o, ox, u, ian, obo, as, um")

ANIMALS = _words(
    """fox, hen, bear, rabbit, mouse, owl, cat, dog, duck, goat, hedgehog, squirrel, frog, turtle,
    badger, otter, wolf, lamb, pony, donkey, goose, robin, sparrow, crow, beaver, mole, deer, piglet,
    puppy, kitten, lion, elephant, monkey, parrot, penguin, seal, tiger, zebra, camel, snail, bee,
    ant, beetle, ladybug, raccoon, panda, koala, swan, heron, lizard, cow, horse, sheep, pig, rooster,
    chicken, rat, hamster, bird, whale, dolphin, crab, octopus, giraffe, kangaroo, moose, bat,
    butterfly, spider, fish, dragon, unicorn, robot, giant, dinosaur, snowman, troll"""
)
SHE_PEOPLE = _words(
    """girl, princess, queen, old woman, grandmother, fairy, witch, shepherd girl, lady, mermaid,
    milkmaid"""
)
HE_PEOPLE = _words(
    """boy, prince, king, old man, grandfather, knight, wizard, shepherd boy, elf, fisherman"""
)
EITHER_PEOPLE = _words(
    """baker, farmer, sailor, gardener, painter, doctor, teacher, pirate, clockmaker, child"""
)

TRAITS = _words(
    """small, brave, shy, clever, kind, quiet, merry, curious, young, old, gentle, cheerful, patient,
    sleepy, proud, lonely, hungry, careful, tiny, big, wise, funny, friendly, busy, happy, little,
    strong, honest, playful, lazy, stubborn, thoughtful, polite, clumsy, lucky, bold, sweet, calm"""
)

COLOURS = _words(
    """red, blue, green, yellow, silver, golden, white, black, brown, purple, orange, pink, grey, wooden,
    copper, glass, shiny, striped, round, tiny, old, broken, paper, woollen, big, heavy, soft, pretty,
    magic, strange, new"""
)
PLAIN_COLOURS = _words(
    """red, blue, green, yellow, silver, golden, white, black, brown, purple, orange, pink, grey"""
)
OBJECTS = _words(
    """lantern, kite, button, key, bell, drum, map, ring, boat, scarf, book, ball, hat, flute, basket,
    mirror, feather, spoon, teapot, cup, blanket, ribbon, whistle, compass, clock, coin, box, shell,
    stone, marble, necklace, crown, candle, umbrella, ladder, rope, bucket, brush, letter, puppet,
    wagon, sled, trumpet, violin, jar, bottle, pillow, glove, boot, coat, doll, top, star, flag, cart,
    lamp, wheel, chair, bag, pencil, mitten, cloak, sword, shoe, toy, guitar, watch, card"""
)

PLACES = _words(
    """by the river, in the deep forest, on the windy hill, at the old mill, near the quiet pond, in the
    garden, under the big oak tree, by the sea, in the village, at the market, on the farm, in the
    tall tower, behind the red barn, in the green meadow, at the edge of the woods, in the dark cave,
    by the stone bridge, on the little island, in the warm kitchen, at the school, in the apple
    orchard, near the waterfall, by the garden gate, on the snowy mountain, in the attic, under the
    bridge, in the castle, at the harbour, in the corn field, by the well, in the cellar, on the sandy
    beach, in the library, at the crossroads, near the windmill, in the valley, behind the house, at
    the station, in the park, on the roof, in the barn, by the lake, in the town, near the fence, in
    the jungle, in the desert, at the bakery, in the tree house"""
)
FOODS = _words(
    """honey cake, apple pie, bread, soup, cheese, berries, carrots, nuts, pancakes, porridge, plums,
    pears, cookies, corn, jam, milk, strawberries, mushrooms, oats, grapes, cherries, potatoes, seeds,
    fish stew, blueberry muffins, cake, apples, peaches, rice, noodles, ginger biscuits, buttered
    toast"""
)
WEATHERS = _words(
    """the sun was shining, a soft rain was falling, the wind was blowing hard, snow covered the ground,
    the sky was grey, a thick fog lay over the land, the air was warm and still, thunder rolled far
    away, the first leaves were falling, the sky was clear, the morning was cold, frost sparkled on
    the grass, a rainbow stood in the sky, it was very hot, small clouds drifted by, it was very
    early, the birds were singing, the flowers were opening"""
)
FEARS = _words(
    """the dark, deep water, thunder, high places, loud noises, strangers, shadows, the big dog next
    door, being alone, the cold wind, falling, spiders, the old cave, big waves, the long night, bad
    dreams"""
)
SKILLS = _words(
    """sing, dance, swim, whistle, paint, bake bread, juggle, read, tell stories, play the drum, climb
    trees, build kites, skate, fish, knit, tie knots, grow roses, ride a bicycle, fly, row a boat,
    write letters, cook"""
)
PROJECTS = _words(
    """boat, bridge, kite, house, garden, swing, tree house, raft, wagon, bird house, snowman, sand
    castle, fort, windmill, tower, stage, little shop, bench, fence, flying machine, lighthouse"""
)
SAYINGS = _words(
    """a kind word costs nothing, a small light is enough for the next step, many hands make light work,
    good things come to those who share, the truth is always the shortest road, a friend is the best
    treasure, slow steps still reach the top, every storm comes to an end, to ask for help is brave,
    small helpers can do great things, what you give comes back to you, we learn by trying again, a
    promise is a promise, it is never too late to be kind, patience opens every door, courage grows
    when we use it, home is where your friends are, one good turn deserves another, even the longest
    night ends in the morning, listening is half of knowing"""
)
FEELINGS = _words(
    """happy, proud, glad, very happy, full of joy, warm inside, thankful, pleased, light as a feather"""
)
SORROWS = _words("sad, worried, upset, very sad, lonely, afraid, unhappy, troubled, tired")

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("fast", "slow"),
    ("happy", "sad"), ("old", "young"), ("wet", "dry"), ("open", "closed"), ("light", "dark"),
    ("high", "low"), ("loud", "quiet"), ("full", "empty"), ("hard", "soft"), ("early", "late"),
    ("long", "short"), ("left", "right"), ("in", "out"),
)  # fmt: skip
SOUNDS = (
    ("cow", "moo"), ("dog", "woof"), ("cat", "meow"), ("duck", "quack"), ("sheep", "baa"),
    ("pig", "oink"), ("rooster", "cock-a-doodle-doo"), ("owl", "hoot"), ("bee", "buzz"),
    ("mouse", "squeak"), ("frog", "ribbit"), ("lion", "roar"), ("horse", "neigh"), ("hen", "cluck"),
    ("crow", "caw"), ("donkey", "hee-haw"),
)  # fmt: skip
DISHES = _words(
    """apple, pear, plum, carrot, cake, cookie, pancake, muffin, sandwich, pie, bun, potato, tomato, egg"""
)
DISH_LOOKS = _words("""sweet, big, small, warm, fresh, red, green, yellow, brown, golden, tasty, ripe""")
NUMBERS = _words(
    """zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
    fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"""
)
FRUITS = _words(
    """apples, pears, plums, grapes, cherries, peaches, strawberries, bananas, oranges, lemons, berries"""
)
LISTS: dict[str, tuple[str, ...]] = {
    "animals": ANIMALS[:60],
    "colours": PLAIN_COLOURS,
    "fruits": FRUITS,
    "toys": _words("ball, kite, doll, drum, puppet, marble, top, wagon, sled, whistle, toy boat"),
    "things to eat": FOODS,
    "names": SHE_NAMES + HE_NAMES,
    "musical instruments": _words("drum, flute, violin, trumpet, guitar, bell, whistle, piano, harp"),
    "things to wear": _words("hat, coat, scarf, boots, gloves, shoes, mittens, cloak, socks, shirt"),
}
