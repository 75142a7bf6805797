-- A ledger of schema version 1 as the first release wrote it; {serial} is the counting integer of the database.
CREATE TABLE anchors (
	digest TEXT NOT NULL,
	trunk TEXT NOT NULL,
	summary TEXT NOT NULL,
	sealed_at TEXT NOT NULL,
	PRIMARY KEY (digest)
);
INSERT INTO "anchors" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','t','{"items":8}','2026-01-01T00:00:00.000000+00:00');
CREATE TABLE audit (
	seq {serial} NOT NULL,
	at TEXT NOT NULL,
	kind TEXT NOT NULL,
	payload TEXT NOT NULL,
	prev_hash TEXT NOT NULL,
	hash TEXT NOT NULL,
	PRIMARY KEY (seq)
);
INSERT INTO "audit" VALUES(1,'2026-01-01T00:00:00.000000+00:00','anchor','{"digest":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","items":8,"trunk":"t"}','0000000000000000000000000000000000000000000000000000000000000000','db5d695d843bf3aa36b37c8f8461619b15334e148e020dd41c0f6ae8e7ab66bf');
INSERT INTO "audit" VALUES(2,'2026-01-01T00:00:00.000000+00:00','source','{"digest":"ssssssssssssssssssssssssssssssssssssssssssssssssssssssssssssssss","lineage":"run-1","version":1}','db5d695d843bf3aa36b37c8f8461619b15334e148e020dd41c0f6ae8e7ab66bf','520b2b7a6fdde56413fbeb0ede36cc2cf2e7d2abf4b438d3ac2460d3ac320942');
INSERT INTO "audit" VALUES(3,'2026-01-01T00:00:00.000000+00:00','champion','{"before":null,"version":1}','520b2b7a6fdde56413fbeb0ede36cc2cf2e7d2abf4b438d3ac2460d3ac320942','13940730ba6618ea7512f0df04e56cc6f2ced1f674dacc3ad664e2e4c2be2b7b');
INSERT INTO "audit" VALUES(4,'2026-01-01T00:00:00.000000+00:00','cycle','{"cycle":"cycle-00001","source_version":1}','13940730ba6618ea7512f0df04e56cc6f2ced1f674dacc3ad664e2e4c2be2b7b','3e2719b96c933d8c2f8deeac3555a12d35eb91aefded09981242c0c72376e5d4');
INSERT INTO "audit" VALUES(5,'2026-01-01T00:00:00.000000+00:00','rollout','{"event":"planned","rollout":"release-00001","status":"completed"}','3e2719b96c933d8c2f8deeac3555a12d35eb91aefded09981242c0c72376e5d4','fd9737db792469835e9719275b367cc9768e9ff67c79bdd0ac85e17c8c243cae');
INSERT INTO "audit" VALUES(6,'2026-01-01T00:00:00.000000+00:00','promote','{"reason":"","rollout":"release-00001","sites":{"Zeta":[1,"2547247271efa6de",1]},"wave":1}','fd9737db792469835e9719275b367cc9768e9ff67c79bdd0ac85e17c8c243cae','03e5e5d0b015cd33d7659c1b37489d2645432806b419d862b8d8e4a51bc513ac');
INSERT INTO "audit" VALUES(7,'2026-01-01T00:00:00.000000+00:00','test','{"last":true}','03e5e5d0b015cd33d7659c1b37489d2645432806b419d862b8d8e4a51bc513ac','3c7e9d9e045fa1acced00ccb664879b28bf19222ae5b568ba04a0b53dabea452');
CREATE TABLE cycles (
	id TEXT NOT NULL,
	kind TEXT NOT NULL,
	generation BIGINT NOT NULL,
	status TEXT NOT NULL,
	fingerprint TEXT NOT NULL,
	config TEXT NOT NULL,
	holder TEXT NOT NULL,
	lease_until TEXT NOT NULL,
	started TEXT NOT NULL,
	finished TEXT,
	summary TEXT NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO "cycles" VALUES('cycle-00001','cycle',1,'finished','f','{}','a','2026-01-01T00:02:00.000000+00:00','2026-01-01T00:00:00.000000+00:00','2026-01-01T00:00:00.000000+00:00','{"source_version":1}');
INSERT INTO "cycles" VALUES('cycle-00002','cycle',1,'running','f','{}','a','2026-01-02T00:02:00.000000+00:00','2026-01-02T00:00:00.000000+00:00',NULL,'{}');
CREATE TABLE meta (
	"key" TEXT NOT NULL,
	value TEXT NOT NULL,
	PRIMARY KEY ("key")
);
INSERT INTO "meta" VALUES('schema','1');
INSERT INTO "meta" VALUES('audit_head','3c7e9d9e045fa1acced00ccb664879b28bf19222ae5b568ba04a0b53dabea452');
INSERT INTO "meta" VALUES('champion','1');
CREATE TABLE quarantine (
	id {serial} NOT NULL,
	site TEXT NOT NULL,
	segment TEXT NOT NULL,
	"row" BIGINT NOT NULL,
	sample_id TEXT,
	reason TEXT NOT NULL,
	cycle TEXT NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO quarantine (site, segment, row, sample_id, reason, cycle) VALUES('Zeta','segment-1.parquet',3,'x','rgb: torn','cycle-00001');
INSERT INTO quarantine (site, segment, row, sample_id, reason, cycle) VALUES('Zeta','segment-2.parquet',3,'x','rgb: torn','cycle-00002');
CREATE TABLE rollouts (
	id TEXT NOT NULL,
	plan_hash TEXT NOT NULL,
	status TEXT NOT NULL,
	body TEXT NOT NULL,
	revision BIGINT NOT NULL,
	created_at TEXT NOT NULL,
	updated_at TEXT NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO "rollouts" VALUES('release-00001','h','completed','{"plan":{"targets":{"Zeta":{"to":{"state_id":"2547247271efa6de"}}}}}',1,'2026-01-01T00:00:00.000000+00:00','2026-01-01T00:00:00.000000+00:00');
CREATE TABLE segments (
	site TEXT NOT NULL,
	name TEXT NOT NULL,
	sha256 TEXT NOT NULL,
	rows BIGINT NOT NULL,
	base_offset BIGINT NOT NULL,
	good BIGINT NOT NULL,
	quarantined BIGINT NOT NULL,
	cycle TEXT NOT NULL,
	ingested_at TEXT NOT NULL,
	PRIMARY KEY (site, name)
);
INSERT INTO "segments" VALUES('Zeta','segment-1.parquet','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',10,0,9,1,'cycle-00001','2026-01-01T00:00:00.000000+00:00');
INSERT INTO "segments" VALUES('alpha','segment-1.parquet','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',10,0,9,1,'cycle-00001','2026-01-01T00:00:00.000000+00:00');
INSERT INTO "segments" VALUES('Zeta','segment-2.parquet','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',10,10,9,1,'cycle-00002','2026-01-02T00:00:00.000000+00:00');
INSERT INTO "segments" VALUES('alpha','segment-2.parquet','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',10,10,9,1,'cycle-00002','2026-01-02T00:00:00.000000+00:00');
CREATE TABLE served (
	site TEXT NOT NULL,
	counter BIGINT NOT NULL,
	state TEXT,
	source_version BIGINT NOT NULL,
	rollout TEXT NOT NULL,
	wave BIGINT NOT NULL,
	kind TEXT NOT NULL,
	since TEXT NOT NULL,
	PRIMARY KEY (site, counter)
);
INSERT INTO "served" VALUES('Zeta',1,'2547247271efa6de',1,'release-00001',1,'promote','2026-01-01T00:00:00.000000+00:00');
CREATE TABLE sites (
	site TEXT NOT NULL,
	tags TEXT NOT NULL,
	status TEXT NOT NULL,
	reason TEXT NOT NULL,
	registered_at TEXT NOT NULL,
	ingested BIGINT NOT NULL,
	learned BIGINT NOT NULL,
	learner TEXT,
	holds BIGINT NOT NULL,
	PRIMARY KEY (site)
);
INSERT INTO "sites" VALUES('Zeta','{"rig":"a"}','active','','2026-01-01T00:00:00.000000+00:00',20,20,'4112ada181aa3ef5',0);
INSERT INTO "sites" VALUES('alpha','{}','active','','2026-01-01T00:00:00.000000+00:00',20,10,'bf7d9767b3bb0436',1);
CREATE TABLE sources (
	version {serial} NOT NULL,
	digest TEXT NOT NULL,
	trunk TEXT NOT NULL,
	path TEXT NOT NULL,
	manifest TEXT NOT NULL,
	lineage TEXT NOT NULL,
	created_at TEXT NOT NULL,
	PRIMARY KEY (version)
);
INSERT INTO "sources" VALUES(1,'ssssssssssssssssssssssssssssssssssssssssssssssssssssssssssssssss','t','p','{"method":"rise"}','run-1','2026-01-01T00:00:00.000000+00:00');
CREATE TABLE states (
	id TEXT NOT NULL,
	site TEXT NOT NULL,
	cycle TEXT NOT NULL,
	source_version BIGINT NOT NULL,
	method TEXT NOT NULL,
	blob TEXT NOT NULL,
	slot BIGINT NOT NULL,
	offset_from BIGINT NOT NULL,
	offset_to BIGINT NOT NULL,
	parent TEXT,
	created_at TEXT NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO "states" VALUES('2547247271efa6de','Zeta','cycle-00001',1,'danet','0000000000000000000000000000000000000000000000000000000000000000',0,0,10,NULL,'2026-01-01T00:00:00.000000+00:00');
INSERT INTO "states" VALUES('bf7d9767b3bb0436','alpha','cycle-00001',1,'danet','0000000000000000000000000000000000000000000000000000000000000000',1,0,10,NULL,'2026-01-01T00:00:00.000000+00:00');
INSERT INTO "states" VALUES('4112ada181aa3ef5','Zeta','cycle-00002',1,'danet','1111111111111111111111111111111111111111111111111111111111111111',0,10,20,NULL,'2026-01-02T00:00:00.000000+00:00');
CREATE TABLE verdicts (
	id TEXT NOT NULL,
	site TEXT NOT NULL,
	cycle TEXT NOT NULL,
	state TEXT,
	outcome TEXT NOT NULL,
	verdict TEXT NOT NULL,
	evidence TEXT NOT NULL,
	counters TEXT NOT NULL,
	offset_from BIGINT NOT NULL,
	offset_to BIGINT NOT NULL,
	at TEXT NOT NULL,
	PRIMARY KEY (id)
);
INSERT INTO "verdicts" VALUES('2547247271efa6de','Zeta','cycle-00001','2547247271efa6de','pass','{"outcome":"pass","reasons":[{"guard":"ceiling","call":"pass","where":"all/print","number":0.004980443380361347,"limit":0.07,"text":"APCER of print under all: 0 of 600, upper95 0.50%, limit 7.00%","advisory":false},{"guard":"noninferiority","call":"pass","where":"all/all attacks","number":0.0038640769225138667,"limit":0.005,"text":"all attacks under all: 0 worse, 0 better of 600, upper95 +0.39%, margin 0.50%","advisory":false},{"guard":"trust","call":"pass","where":"state","number":0.01,"limit":0.1,"text":"distance from the source state over its norm: 0.010, limit 0.100","advisory":false},{"guard":"trust","call":"pass","where":"anchor","number":0.0,"limit":0.5,"text":"fall of the attack margin in logits: 0.000, limit 0.500","advisory":false}],"abort":false,"labels":"anchor"}','{"cells":[{"pattern":"all","species":"print","n":600,"errors":0,"worse":0,"better":0},{"pattern":"all","species":"bona_fide","n":600,"errors":0,"worse":0,"better":0}],"trust_ratio":0.01,"margin_drop":0.0,"stream_n":500,"age_seconds":1.0,"finite":true,"holds_before":0,"merged":[],"labels":"anchor"}','{"outcomes":"0000000000000000000000000000000000000000000000000000000000000000","samples":9}',0,10,'2026-01-01T00:00:00.000000+00:00');
INSERT INTO "verdicts" VALUES('bf7d9767b3bb0436','alpha','cycle-00001','bf7d9767b3bb0436','hold','{"outcome":"hold","reasons":[{"guard":"no_data","call":"hold","where":"stream","number":1.0,"limit":100.0,"text":"1 stream samples, at least 100 are needed","advisory":false},{"guard":"ceiling","call":"pass","where":"all/print","number":0.004980443380361347,"limit":0.07,"text":"APCER of print under all: 0 of 600, upper95 0.50%, limit 7.00%","advisory":false},{"guard":"noninferiority","call":"pass","where":"all/all attacks","number":0.0038640769225138667,"limit":0.005,"text":"all attacks under all: 0 worse, 0 better of 600, upper95 +0.39%, margin 0.50%","advisory":false},{"guard":"trust","call":"pass","where":"state","number":0.01,"limit":0.1,"text":"distance from the source state over its norm: 0.010, limit 0.100","advisory":false},{"guard":"trust","call":"pass","where":"anchor","number":0.0,"limit":0.5,"text":"fall of the attack margin in logits: 0.000, limit 0.500","advisory":false}],"abort":false,"labels":"anchor"}','{"cells":[{"pattern":"all","species":"print","n":600,"errors":0,"worse":0,"better":0},{"pattern":"all","species":"bona_fide","n":600,"errors":0,"worse":0,"better":0}],"trust_ratio":0.01,"margin_drop":0.0,"stream_n":1,"age_seconds":1.0,"finite":true,"holds_before":0,"merged":[],"labels":"anchor"}','{"outcomes":"0101010101010101010101010101010101010101010101010101010101010101","samples":9}',0,10,'2026-01-01T00:00:00.000000+00:00');
INSERT INTO "verdicts" VALUES('4112ada181aa3ef5','Zeta','cycle-00002','4112ada181aa3ef5','pass','{"outcome":"pass","reasons":[{"guard":"ceiling","call":"pass","where":"all/print","number":0.004980443380361347,"limit":0.07,"text":"APCER of print under all: 0 of 600, upper95 0.50%, limit 7.00%","advisory":false},{"guard":"noninferiority","call":"pass","where":"all/all attacks","number":0.0038640769225138667,"limit":0.005,"text":"all attacks under all: 0 worse, 0 better of 600, upper95 +0.39%, margin 0.50%","advisory":false},{"guard":"trust","call":"pass","where":"state","number":0.01,"limit":0.1,"text":"distance from the source state over its norm: 0.010, limit 0.100","advisory":false},{"guard":"trust","call":"pass","where":"anchor","number":0.0,"limit":0.5,"text":"fall of the attack margin in logits: 0.000, limit 0.500","advisory":false}],"abort":false,"labels":"anchor"}','{"cells":[{"pattern":"all","species":"print","n":600,"errors":0,"worse":0,"better":0},{"pattern":"all","species":"bona_fide","n":600,"errors":0,"worse":0,"better":0}],"trust_ratio":0.01,"margin_drop":0.0,"stream_n":500,"age_seconds":1.0,"finite":true,"holds_before":0,"merged":[],"labels":"anchor"}','{"outcomes":"1010101010101010101010101010101010101010101010101010101010101010","samples":9}',10,20,'2026-01-02T00:00:00.000000+00:00');
CREATE INDEX quarantine_site ON quarantine (site);
CREATE INDEX states_site ON states (site);
CREATE INDEX verdicts_cycle ON verdicts (cycle);
CREATE INDEX verdicts_site ON verdicts (site);
