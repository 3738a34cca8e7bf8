from ml.cores import available_cores
from ml.serving.machine import this_machine


def test_on_ec2_the_firmware_names_the_instance_type_and_elsewhere_it_does_not(tmp_path):
    (tmp_path / "product_name").write_text("c7i.xlarge\n")
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert this_machine({}, dmi=tmp_path).instance_type == "c7i.xlarge"
    assert (
        this_machine({"SM_CURRENT_INSTANCE_TYPE": "ml.c7i.large"}, dmi=tmp_path).instance_type
        == "ml.c7i.large"
    )
    (tmp_path / "sys_vendor").write_text("Dell Inc.\n")
    assert this_machine({}, dmi=tmp_path).instance_type == ""


def test_the_description_says_all_that_tells_two_machines_apart(tmp_path):
    cpu = tmp_path / "cpuinfo"
    cpu.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU 9000\nprocessor\t: 1\nmodel name\t: Fast CPU 9000\n"
    )
    machine = this_machine({"SM_CURRENT_INSTANCE_TYPE": "ml.c7i.large"}, cpu_file=cpu)
    assert machine.cores == available_cores()
    assert machine.description == (
        f"ml.c7i.large: Fast CPU 9000, {machine.architecture}, {available_cores()} cores"
    )


def test_a_system_that_says_nothing_is_still_a_machine(tmp_path):
    machine = this_machine({}, dmi=tmp_path / "nowhere", cpu_file=tmp_path / "nowhere")
    assert machine.cpu
    assert machine.instance_type == ""
