"""What masked regions have to teach: a detector that says the same of all of them teaches nothing."""

import numpy as np

from megainter.data.feature_store.reader import FeatureStore

LOOKED_AT = 200  # images, spread over the store: a second or so
NEARLY_ALL = 0.95  # of the regions


def hardly_varied(store: FeatureStore) -> str:
    """A warning where nearly all regions of some images have one likeliest class, by which masked regions are judged; "" where not.

    A model that knows nothing else has that share right.
    """
    rows = np.unique(np.linspace(0, len(store) - 1, min(LOOKED_AT, len(store))).astype(np.int64))
    names, counts = store.schema.class_names, np.zeros(store.schema.num_classes, np.int64)
    for row in rows.tolist():
        record = store.at(row)
        likeliest = record.class_probs(np.arange(len(record))).argmax(axis=1)
        counts += np.bincount(likeliest, minlength=len(counts))
    best = int(counts.argmax())
    share = counts[best] / counts.sum()
    if share < NEARLY_ALL:
        return ""
    return (
        f"{share:.1%} of the regions in {store.path} are likeliest {names[best]!r:.80}: an accuracy of masked regions near {share:.3f} "
        "says nothing, and they teach little; look at the regions with `megainter view`, let features be learned instead "
        "(--model.region_objective feature), or take a detector that knows such images"
    )
