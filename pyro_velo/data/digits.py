"""1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: real profiles whose clusters are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData


def digits() -> AnnData:
    """Images as cells and pixels as genes, 0 to 16 in `X` (float32); what each shows in obs `digit`.

    Reference: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
    """
    from sklearn.datasets import load_digits

    images, shown = load_digits(return_X_y=True)
    obs = pd.DataFrame(
        {"digit": pd.Categorical([str(each) for each in shown])}, index=[f"image_{i}" for i in range(len(images))]
    )
    var = pd.DataFrame(index=[f"pixel_{row}_{column}" for row in range(8) for column in range(8)])
    return AnnData(images.astype(np.float32), obs=obs, var=var)
