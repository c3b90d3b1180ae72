

print(double(4))
