"""codec: lossless coding of integer symbols of any range, at their entropy. Import its files, as `codec.decoder`.

Two coders. `exp-golomb` is the structured prefix code the literature uses for generalized-Gaussian weights. `rans` is
an interleaved range asymmetric numeral system with one static table for each array: it reaches the zero-order entropy
from 0.05 bits a symbol up, and every one-symbol prefix code wastes what lies below one bit.
"""
