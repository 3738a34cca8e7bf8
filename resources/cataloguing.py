"""The door to cataloguing a day: the way on which its offers get their categories.

Through the endpoint, one request after the other (here), or by a bulk job
(:mod:`resources.transform_cataloguing`). Either way the stage ``catalogued_offers`` makes the same artifact.
"""

from abc import ABC, abstractmethod
from typing import Any

import dagster as dg
from typing_extensions import override

from ml.artifacts import ArtifactRef
from ml.stages import CataloguedOffersParameters
from resources.compute import AnyContext, Compute, StageResult
from resources.endpoints import Endpoints, variant_name


class Cataloguing(dg.ConfigurableResource[Any], ABC):
    """How the clean offers of a day are catalogued."""

    # Dagster reads these annotations as they stand: no postponed annotations in this module.
    compute: dg.ResourceDependency[Compute]
    endpoints: dg.ResourceDependency[Endpoints]

    @abstractmethod
    def catalogue(
        self, context: AnyContext, day: str, offers: ArtifactRef, model: ArtifactRef
    ) -> StageResult:
        """Have every offer answered by one model version, or find that done.

        Args:
            context: Of the asset on whose behalf it happens; its log gets the progress.
            day: ISO date of the offers.
            offers: The clean offers.
            model: The compiled student that has to answer.

        Raises:
            InputFailure: a person has to change something; one line, never retried.
            dg.Failure: it ended otherwise. It may be retried; what is answered already is not asked again.
        """


class EndpointCataloguing(Cataloguing):
    """Every offer goes through the endpoint, which is brought up again if it is gone."""

    @override
    def catalogue(
        self, context: AnyContext, day: str, offers: ArtifactRef, model: ArtifactRef
    ) -> StageResult:
        status = self.endpoints.status()
        if status is None:
            context.log.info("the endpoint does not answer (a restart of the machine?): bringing it up again")
            with self.endpoints.releasing():
                status = self.endpoints.deploy(self.compute.folder(model), model)
        return self.compute.run(
            context,
            "catalogued_offers",
            {"offers": offers, "compiled_student": model},
            CataloguedOffersParameters(endpoint_url=status.url, variant=variant_name(model)),
        )
