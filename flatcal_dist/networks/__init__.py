"""Networks by name, and weights for them.

A new network needs two files: a module in this package, such as lenet.py, and its test. The module
registers a function with timm:

    @timm.models.register_model
    def lenet(pretrained=False, *, num_classes, in_chans, **ignored):
        return LeNet(num_classes, in_chans)

The network is then `model.name=lenet`, and the other arguments of the function are its
`model.options`. A function with an argument `img_size` gets data.image_size. Modules in rooms of
this package, such as small_images/, are found too. README.md has the table of names.
"""
