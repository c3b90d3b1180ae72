"""Count the words of a file."""

import sys


def words(path):
    with open(path) as file:
        return file.read().split()


def main():
    
    for path in sys.argv[1:]:
        print(path, len(words(path)))


main()
