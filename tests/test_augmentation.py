import torch

from federated.data.augmentation import PADDING, crop_flip

IMAGES = torch.arange(1, 1 + 200 * 3 * 10 * 9).view(200, 3, 10, 9)  # no two pixels are alike


def draw(images, seed=0):
    return crop_flip(images, torch.Generator().manual_seed(seed))


def test_each_image_is_a_crop_of_itself_padded_mirrored_or_not():
    drawn = []
    for image, augmented in zip(IMAGES, draw(IMAGES)):
        padded = torch.nn.functional.pad(image, [PADDING] * 4)
        crops = {
            (down, right, mirrored): crop.flip(2) if mirrored else crop
            for down in range(2 * PADDING + 1)
            for right in range(2 * PADDING + 1)
            for mirrored in (False, True)
            for crop in [padded[:, down : down + 10, right : right + 9]]
        }
        (found,) = (where for where, crop in crops.items() if torch.equal(crop, augmented))
        drawn.append(found)
    down, right, mirrored = map(set, zip(*drawn))
    assert down == right == set(range(2 * PADDING + 1)) and mirrored == {False, True}


def test_draws_are_a_function_of_the_generator_and_not_of_the_images():
    assert torch.equal(draw(IMAGES, 1), draw(IMAGES, 1)) and not torch.equal(draw(IMAGES, 1), draw(IMAGES, 2))
    as_bytes = (IMAGES % 256).to(torch.uint8)
    assert torch.equal(draw(as_bytes), draw(IMAGES % 256).to(torch.uint8)) and draw(as_bytes).dtype == torch.uint8
    assert torch.equal(draw(-IMAGES), -draw(IMAGES))
