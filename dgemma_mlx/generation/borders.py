"""Words that are written twice where two canvases meet.

A canvas is denoised without a draft of its neighbours. Users of the real model see the last words of a canvas again at
the beginning of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONGEST = 16  # tokens of a repetition that are looked for


def repeats_words(before: Sequence[int], canvas: Sequence[int], decode: Callable[[Sequence[int]], str]) -> bool:
    """Return whether a canvas begins with the words that end the text before it.

    Only whole words count: " the" after " the", but neither the second half of "egg" nor the digits of a table. Words
    that the text before the canvas holds twice in a row already are meant: "no no no".

    Args:
        before: Ids of the text before the canvas.
        canvas: Ids of the canvas, without an end-of-text id.
        decode: Returns the text of some ids.
    """
    for count in range(1, min(LONGEST, len(before), len(canvas)) + 1):
        last = list(before[-count:])
        if last == list(canvas[:count]):
            if last == list(before[-2 * count : -count]):
                return False
            words, after = decode(canvas[:count]), decode(canvas[count : count + 1])
            if words[:1].isspace() and any(map(str.isalpha, words)) and not after[:1].isalnum():
                return True
    return False
