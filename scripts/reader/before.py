def double(number):
    return 