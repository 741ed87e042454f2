"""The networks that the literature trains on images of 32 and 64 pixels.

Each takes any number of classes and channels and, but for lenet5, images of any size. Where timm or
torchvision has the layers, they are used; `flatcal_dist/networks/README.md` has the table of
names, sizes and sources. "FMFP" stands for the code of Zhu et al. (Rethinking Confidence
Calibration for Failure Prediction, ECCV 2022), github.com/Impression2805/FMFP at commit 97f673c.

Images of 64 pixels pass through the same layers, and the last map is averaged whatever its size. So
weights fit both sizes.
"""
