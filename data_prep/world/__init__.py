"""The synthetic world: coloured shapes that move, with captions, as clips that a judge can read.

Every clip is a function of its seed, at any size, so that demo, training of the codec and tests see
the same world and download nothing. Read in this order:

    vocabulary.py  its words, and what they mean in numbers
    split.py       combinations of words that training never shows
    scene.py       a scene, and which kinds of scenes there are
    draw.py        the scene that a seed draws: `random_scene`
    mechanics.py   where things and camera are at any moment; collisions, occlusion
    background.py  what is behind the things
    render.py      a scene becomes pixels: `render_clip`
    captions.py    what is said of a scene
    prompts.py     prompts that ask for scenes, evenly
    shards.py      the world as shards in Panda-70M's layout
"""
