import numpy as np

from kilofed.zeroth.directions.philox import compiled, philox, philox_into, split64
from kilofed.zeroth.directions.spec import load_vectors


@compiled
def _inlined(out, counter, key):
    c = (np.uint64(counter[0]), np.uint64(counter[1]), np.uint64(counter[2]), np.uint64(counter[3]))
    philox_into(out, 0, 0, c, np.uint64(key[0]), np.uint64(key[1]))


def test_known_answers_of_random123():
    for vector in load_vectors().philox:
        counter, key, words = ([int(word, 16) for word in vector[name]] for name in ("counter", "key", "words"))
        assert philox(counter, key).tolist() == words


def test_vectorised_and_inlined_forms_agree_with_python_integers(plain):
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, size=(50, 4), dtype=np.uint64)
    key = rng.integers(0, 1 << 32, size=2, dtype=np.uint64)
    words = philox(counters, key)
    for counter, expected in zip(counters, words, strict=True):
        assert plain.philox(tuple(map(int, counter)), tuple(map(int, key))) == expected.tolist()
        out = np.zeros((4, 1), dtype=np.uint32)
        _inlined(out, counter, key)
        assert out[:, 0].tolist() == expected.tolist()


def test_split64_is_low_then_high():
    assert split64(0x1234567890ABCDEF) == (0x90ABCDEF, 0x12345678)
