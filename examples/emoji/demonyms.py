"""What the people of a country are called, by its ISO 3166 code: "the French flag" is the flag of France."""

DEMONYMS = {
    code: tuple(names.split("/"))
    for code, names in (
        entry.split("=")
        for entry in """
ad=andorran|ae=emirati|af=afghan|ag=antiguan|ai=anguillan|al=albanian|am=armenian|ao=angolan|aq=antarctic
ar=argentinian/argentine|as=american samoan|at=austrian|au=australian/aussie|aw=aruban|ax=alandic
az=azerbaijani/azeri|ba=bosnian|bb=barbadian/bajan|bd=bangladeshi|be=belgian|bf=burkinabe|bg=bulgarian
bh=bahraini|bi=burundian|bj=beninese|bm=bermudian|bn=bruneian|bo=bolivian|br=brazilian|bs=bahamian
bt=bhutanese|bw=botswanan/motswana|by=belarusian|bz=belizean|ca=canadian|cf=central african|cg=congolese
ch=swiss|ci=ivorian|cl=chilean|cm=cameroonian|cn=chinese|co=colombian|cr=costa rican|cu=cuban|cv=cape verdean
cy=cypriot|cz=czech|de=german|dj=djiboutian|dk=danish|dm=dominican|dz=algerian|ec=ecuadorian|ee=estonian
eg=egyptian|er=eritrean|es=spanish|et=ethiopian|eu=european|fi=finnish|fj=fijian|fk=falkland|fm=micronesian
fo=faroese|fr=french|ga=gabonese|gb=british/uk|gd=grenadian|ge=georgian|gf=french guianese|gg=guernsey
gh=ghanaian|gi=gibraltarian|gl=greenlandic|gm=gambian|gn=guinean|gp=guadeloupean|gq=equatorial guinean
gr=greek|gt=guatemalan|gu=guamanian|gy=guyanese|hk=hong kong|hn=honduran|hr=croatian|ht=haitian|hu=hungarian
ic=canarian|id=indonesian|ie=irish|il=israeli|im=manx|in=indian|iq=iraqi|ir=iranian/persian|is=icelandic
it=italian|jm=jamaican|jo=jordanian|jp=japanese|ke=kenyan|kg=kyrgyz|kh=cambodian|ki=kiribati|km=comorian
kn=kittitian|kp=north korean|kr=korean/south korean|kw=kuwaiti|ky=caymanian|kz=kazakh|la=laotian/lao
lb=lebanese|lc=saint lucian|lk=sri lankan|lr=liberian|ls=basotho|lt=lithuanian|lu=luxembourgish|lv=latvian
ly=libyan|ma=moroccan|mc=monegasque|md=moldovan|me=montenegrin|mg=malagasy/madagascan|mh=marshallese
mk=macedonian|ml=malian|mm=burmese|mn=mongolian|mo=macanese|mq=martinican|mr=mauritanian|ms=montserratian
mt=maltese|mu=mauritian|mv=maldivian|mw=malawian|mx=mexican|my=malaysian|mz=mozambican|na=namibian
nc=new caledonian|ne=nigerien|ng=nigerian|ni=nicaraguan|nl=dutch|no=norwegian|np=nepali/nepalese|nr=nauruan
nu=niuean|nz=new zealand/kiwi|om=omani|pa=panamanian|pe=peruvian|pf=french polynesian/tahitian
pg=papua new guinean|ph=filipino/philippine|pk=pakistani|pl=polish|pr=puerto rican|ps=palestinian
pt=portuguese|pw=palauan|py=paraguayan|qa=qatari|re=reunionese|ro=romanian|rs=serbian|ru=russian|rw=rwandan
sa=saudi/saudi arabian|sb=solomon islander|sc=seychellois|sd=sudanese|se=swedish|sg=singaporean
si=slovenian/slovene|sk=slovak|sl=sierra leonean|sm=sammarinese|sn=senegalese|so=somali|sr=surinamese
ss=south sudanese|sv=salvadoran|sy=syrian|sz=swazi|td=chadian|tg=togolese|th=thai|tj=tajik|tl=timorese
tm=turkmen|tn=tunisian|to=tongan|tr=turkish|tt=trinidadian|tv=tuvaluan|tw=taiwanese|tz=tanzanian|ua=ukrainian
ug=ugandan|us=american/us/usa|uy=uruguayan|uz=uzbek|va=vatican/papal|vc=vincentian|ve=venezuelan|vn=vietnamese
vu=vanuatuan|ws=samoan|xk=kosovar/kosovan|ye=yemeni|za=south african|zm=zambian|zw=zimbabwean
""".replace("\n", "|")
        .strip("|")
        .split("|")
    )
}
